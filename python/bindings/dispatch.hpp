// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The two operations on the device of their arrays. Without CUDA kernels in the build, calls for a
// CUDA device are refused.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arrays.hpp"
#include "oscar/append.hpp"
#include "oscar/attend.hpp"
#include "oscar/cuda.hpp"

namespace oscar::python {

// What a call on a CUDA device needs besides its arrays; ignored on the CPU.
struct Launch {
  std::uintptr_t stream = 0;       // cudaStream_t of the arrays' device, which is the current one
  std::uintptr_t fault = 0;        // address of the fault word, or 0 (include/oscar/cuda.hpp)
  std::int32_t max_query_len = 0;  // bound of a sequence's query tokens; 0: the number of tokens
};

bool cuda_built();
bool cuda_available();

Status append_on(const CacheArguments& cache, const Batch& batch, const ConstRows& k,
                 const ConstRows& v, AppendPart part, const Launch& launch);

std::size_t attend_workspace_bytes_on(Device device, const Layout& layout, std::int32_t batch,
                                      std::int64_t query_tokens, std::int32_t q_heads,
                                      std::int32_t max_query_len);

Status attend_on(const CacheArguments& cache, const Batch& batch, const ConstRows& q,
                 const ConstRows& k_new, const ConstRows& v_new, const AttendOptions& options,
                 const MutableRows& out, float* lse, const MutableArgument& workspace,
                 const Launch& launch, const cuda::AttendPlan* plan);

// A plan in `memory`, on a CUDA device.
std::size_t attend_plan_bytes_on_device();
Status plan_attend_on(const CacheArguments& cache, const Batch& batch, std::int64_t query_tokens,
                      std::int32_t q_heads, const AttendOptions& options,
                      const MutableArray& memory, const Launch& launch, cuda::AttendPlan& plan);

// Adds the words of an array on a CUDA device to total int64 [1] there.
void cuda_read_bytes(const Array& array, const MutableArray& total, std::uintptr_t stream);

}  // namespace oscar::python
