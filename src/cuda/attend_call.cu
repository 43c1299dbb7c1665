// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// cuda::attend: host checks, then the decode path and, where a sequence may have more query tokens,
// the extend path.
#include <limits>
#include <string>

#include "core/check.hpp"
#include "cuda/calls.hpp"
#include "cuda/check.hpp"
#include "oscar/cuda.hpp"

namespace oscar::cuda {
namespace {

constexpr std::size_t kPartAlign = 256;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kPartAlign - 1) / kPartAlign * kPartAlign;
}

std::int32_t query_bound(std::int64_t tokens, std::int32_t max_query_len) {
  const std::int64_t bound = max_query_len > 0 && max_query_len < tokens ? max_query_len : tokens;
  return static_cast<std::int32_t>(bound);
}

template <typename Value>
Status check_same(const char* name, const Value& planned, const Value& given) {
  if (planned == given) return {};
  return invalid("plan was made for " + std::string(name) + " " + std::to_string(planned) +
                 ", this call has " + std::to_string(given));
}

Status check_plan(const AttendPlan& plan, const CudaAttendCall& call) {
  const Layout& layout = call.layout;
  OSCAR_TRY(check_present("plan.memory", plan.memory));
  OSCAR_TRY(check_same("kv_heads", plan.layout.kv_heads, layout.kv_heads));
  OSCAR_TRY(check_same("head_dim", plan.layout.head_dim, layout.head_dim));
  OSCAR_TRY(check_same("k_bits", plan.layout.format.k_bits, layout.format.k_bits));
  OSCAR_TRY(check_same("v_bits", plan.layout.format.v_bits, layout.format.v_bits));
  OSCAR_TRY(check_same("page_tokens", plan.layout.page_tokens, layout.page_tokens));
  OSCAR_TRY(check_same("window", plan.layout.window, layout.window));
  OSCAR_TRY(check_same("sinks", plan.layout.sinks, layout.sinks));
  OSCAR_TRY(check_same("exact_blocks", plan.layout.exact_blocks, layout.exact_blocks));
  OSCAR_TRY(check_same("batch.size", plan.batch_size, call.batch.size));
  OSCAR_TRY(check_same("query tokens", plan.query_tokens, call.q.tokens));
  OSCAR_TRY(check_same("q_heads", plan.q_heads, call.q.heads));
  OSCAR_TRY(check_same("max_query_len", plan.max_query_len, call.max_query_len));
  OSCAR_TRY(check_same("sliding_window", plan.sliding_window, call.options.sliding_window));
  OSCAR_TRY(check_same("strict", plan.strict, call.options.strict));
  return check_same("max_pages", plan.max_pages, call.cache.max_pages);
}

Status check_bound(std::int32_t max_query_len) {
  if (max_query_len >= 0) return {};
  return invalid("max_query_len is " + std::to_string(max_query_len) +
                 ", must be 0 (the number of tokens) or positive");
}

Status check(const CudaAttendCall& call, std::size_t workspace_needed) {
  const std::int32_t kv_heads = call.layout.kv_heads;
  OSCAR_TRY(check_layout(call.layout));
  OSCAR_TRY(check_device_rows("q", call.q, call.q.tokens, call.q.heads));
  OSCAR_TRY(check_device_rows("k_new", call.k_new, call.q.tokens, kv_heads));
  OSCAR_TRY(check_device_rows("v_new", call.v_new, call.q.tokens, kv_heads));
  const ConstRows out{call.out.data,  call.out.dtype,        call.out.tokens,
                      call.out.heads, call.out.token_stride, call.out.head_stride};
  OSCAR_TRY(check_device_rows("out", out, call.q.tokens, call.q.heads));
  OSCAR_TRY(check_query_heads(call.q.heads, kv_heads));
  OSCAR_TRY(check_attend_options(call.options));
  OSCAR_TRY(check_bound(call.max_query_len));
  OSCAR_TRY(check_device_cache(call.cache, call.batch, call.q.tokens));
  return check_scratch("workspace", call.workspace, call.workspace_bytes, workspace_needed,
                       kPartAlign);
}

}  // namespace

std::size_t attend_workspace_bytes(const Layout& layout, std::int32_t batch_size,
                                   std::int64_t query_tokens, std::int32_t q_heads,
                                   std::int32_t max_query_len) noexcept {
  const std::int32_t bound = query_bound(query_tokens, max_query_len);
  std::size_t bytes = aligned(decode_workspace_bytes(layout, batch_size, query_tokens, q_heads));
  if (bound > kMaxDecodeQueries) {
    bytes += aligned(extend_workspace_bytes(layout, batch_size, query_tokens, q_heads, bound));
  }
  return bytes;
}

std::size_t attend_plan_bytes() noexcept { return decode_plan_bytes(); }

Status plan_attend(const Layout& layout, const CacheView& cache, const Batch& batch,
                   std::int64_t query_tokens, std::int32_t q_heads, const AttendOptions& options,
                   void* memory, std::size_t memory_bytes, std::int32_t max_query_len, void* stream,
                   AttendPlan& plan) noexcept {
  OSCAR_TRY(check_layout(layout));
  OSCAR_TRY(check_query_heads(q_heads, layout.kv_heads));
  OSCAR_TRY(check_attend_options(options));
  OSCAR_TRY(check_bound(max_query_len));
  if (query_tokens < 0 || query_tokens > std::numeric_limits<std::int32_t>::max()) {
    return invalid("query_tokens is " + std::to_string(query_tokens) + ", must be 0 to 2147483647");
  }
  OSCAR_TRY(check_device_cache(cache, batch, query_tokens));
  OSCAR_TRY(check_scratch("memory", memory, memory_bytes, decode_plan_bytes(), kPartAlign));
  CudaAttendCall call{};
  call.layout = layout;
  call.cache = cache;
  call.batch = batch;
  call.options = options;
  call.q.tokens = query_tokens;
  call.q.heads = q_heads;
  call.planned = static_cast<std::byte*>(memory);
  call.max_query_len = query_bound(query_tokens, max_query_len);
  plan = {memory,
          layout,
          batch.size,
          query_tokens,
          q_heads,
          call.max_query_len,
          options.sliding_window,
          options.strict,
          cache.max_pages};
  if (query_tokens == 0) return {};
  launch_attend_plan(call, static_cast<cudaStream_t>(stream));
  return launched("plan_attend");
}

Status attend(const Layout& layout, const CacheView& cache, const Batch& batch, const ConstRows& q,
              const ConstRows& k_new, const ConstRows& v_new, const AttendOptions& options,
              const MutableRows& out, float* lse, void* workspace, std::size_t workspace_bytes,
              std::int32_t max_query_len, void* stream, const AttendPlan* plan) noexcept {
  CudaAttendCall call{layout,          cache,        batch, q,   k_new,
                      v_new,           options,      out,   lse, static_cast<std::byte*>(workspace),
                      workspace_bytes, max_query_len};
  OSCAR_TRY(
      check(call, attend_workspace_bytes(layout, batch.size, q.tokens, q.heads, max_query_len)));
  if (q.tokens == 0) return {};
  call.max_query_len = query_bound(q.tokens, max_query_len);
  if (plan != nullptr) {
    OSCAR_TRY(check_plan(*plan, call));
    call.planned = static_cast<std::byte*>(plan->memory);
  }
  const std::size_t decode_bytes =
      aligned(decode_workspace_bytes(layout, batch.size, q.tokens, q.heads));
  const auto on = static_cast<cudaStream_t>(stream);
  CudaAttendCall decode = call;
  decode.workspace_bytes = decode_bytes;
  launch_attend_decode(decode, on);
  if (call.max_query_len > kMaxDecodeQueries) {
    CudaAttendCall extend = call;
    extend.workspace += decode_bytes;
    extend.workspace_bytes -= decode_bytes;
    launch_attend_extend(extend, on);
  }
  return launched("attend");
}

}  // namespace oscar::cuda
