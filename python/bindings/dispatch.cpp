// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "dispatch.hpp"

#ifdef OSCAR_WITH_CUDA
#include "cuda/read_bound.hpp"
#endif

namespace oscar::python {

#ifdef OSCAR_WITH_CUDA

bool cuda_built() { return true; }
bool cuda_available() { return cuda::available(); }

Status append_on(const CacheArguments& cache, const Batch& batch, const ConstRows& k,
                 const ConstRows& v, AppendPart part, const Launch& launch) {
  if (cache.device.is_cpu()) return append(cache.layout, cache.view, batch, k, v, part);
  return cuda::append(cache.layout, cache.view, batch, k, v, part,
                      reinterpret_cast<void*>(launch.stream),
                      reinterpret_cast<std::uint64_t*>(launch.fault));
}

std::size_t attend_workspace_bytes_on(Device device, const Layout& layout, std::int32_t batch,
                                      std::int64_t query_tokens, std::int32_t q_heads,
                                      std::int32_t max_query_len) {
  if (device.is_cpu()) return attend_workspace_bytes(layout, batch, query_tokens, q_heads);
  return cuda::attend_workspace_bytes(layout, batch, query_tokens, q_heads, max_query_len);
}

Status attend_on(const CacheArguments& cache, const Batch& batch, const ConstRows& q,
                 const ConstRows& k_new, const ConstRows& v_new, const AttendOptions& options,
                 const MutableRows& out, float* lse, const MutableArgument& workspace,
                 const Launch& launch, const cuda::AttendPlan* plan) {
  if (cache.device.is_cpu()) {
    return attend(cache.layout, cache.view, batch, q, k_new, v_new, options, out, lse,
                  workspace.data(), workspace.nbytes());
  }
  return cuda::attend(cache.layout, cache.view, batch, q, k_new, v_new, options, out, lse,
                      workspace.data(), workspace.nbytes(), launch.max_query_len,
                      reinterpret_cast<void*>(launch.stream), plan);
}

std::size_t attend_plan_bytes_on_device() { return cuda::attend_plan_bytes(); }

Status plan_attend_on(const CacheArguments& cache, const Batch& batch, std::int64_t query_tokens,
                      std::int32_t q_heads, const AttendOptions& options,
                      const MutableArray& memory, const Launch& launch, cuda::AttendPlan& plan) {
  return cuda::plan_attend(cache.layout, cache.view, batch, query_tokens, q_heads, options,
                           memory.data(), memory.nbytes(), launch.max_query_len,
                           reinterpret_cast<void*>(launch.stream), plan);
}

void cuda_read_bytes(const Array& array, const MutableArray& total, std::uintptr_t stream) {
  const Device device = device_of(array);
  if (device.is_cpu()) throw nb::type_error("array is on the CPU, must be on a CUDA device");
  require_device("total", device_of(total), device);
  cuda::read_bytes(array.data(), array.nbytes(), static_cast<std::uint64_t*>(total.data()),
                   reinterpret_cast<void*>(stream));
}

#else

namespace {

Status no_kernels() {
  return {StatusCode::kUnsupported,
          "pages is on a CUDA device: this build of oscar_kv has no CUDA kernels, build it with "
          "OSCAR_CUDA=ON"};
}

}  // namespace

bool cuda_built() { return false; }
bool cuda_available() { return false; }

Status append_on(const CacheArguments& cache, const Batch& batch, const ConstRows& k,
                 const ConstRows& v, AppendPart part, const Launch&) {
  if (!cache.device.is_cpu()) return no_kernels();
  return append(cache.layout, cache.view, batch, k, v, part);
}

std::size_t attend_workspace_bytes_on(Device, const Layout& layout, std::int32_t batch,
                                      std::int64_t query_tokens, std::int32_t q_heads,
                                      std::int32_t) {
  return attend_workspace_bytes(layout, batch, query_tokens, q_heads);
}

Status attend_on(const CacheArguments& cache, const Batch& batch, const ConstRows& q,
                 const ConstRows& k_new, const ConstRows& v_new, const AttendOptions& options,
                 const MutableRows& out, float* lse, const MutableArgument& workspace,
                 const Launch&, const cuda::AttendPlan*) {
  if (!cache.device.is_cpu()) return no_kernels();
  return attend(cache.layout, cache.view, batch, q, k_new, v_new, options, out, lse,
                workspace.data(), workspace.nbytes());
}

std::size_t attend_plan_bytes_on_device() { return 0; }

Status plan_attend_on(const CacheArguments&, const Batch&, std::int64_t, std::int32_t,
                      const AttendOptions&, const MutableArray&, const Launch&, cuda::AttendPlan&) {
  return no_kernels();
}

void cuda_read_bytes(const Array&, const MutableArray&, std::uintptr_t) { raise(no_kernels()); }

#endif

}  // namespace oscar::python
