// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// A checked call as the kernels get it, by value (__grid_constant__); all pointers in it are device
// memory. The launchers only enqueue kernels; the caller reads cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "oscar/append.hpp"
#include "oscar/attend.hpp"
#include "oscar/cuda.hpp"

namespace oscar::cuda {

struct CudaAppendCall {
  Layout layout;
  CacheView cache;
  Batch batch;
  ConstRows k;
  ConstRows v;
  AppendPart part = AppendPart::kBoth;
  std::uint64_t* fault = nullptr;
};

struct CudaAttendCall {
  Layout layout;
  CacheView cache;
  Batch batch;
  ConstRows q;
  ConstRows k_new;
  ConstRows v_new;
  AttendOptions options;
  MutableRows out;
  float* lse = nullptr;
  std::byte* workspace = nullptr;  // of the path that is launched, 256-byte aligned
  std::size_t workspace_bytes = 0;
  std::int32_t max_query_len = 0;  // upper bound of one sequence's query tokens, at least 1
  std::byte* planned = nullptr;    // memory of an AttendPlan, or null: blocks plan for themselves
};

void launch_append(const CudaAppendCall& call, cudaStream_t stream);         // append.cu
void launch_attend_decode(const CudaAttendCall& call, cudaStream_t stream);  // attend.cu
void launch_attend_plan(const CudaAttendCall& call, cudaStream_t stream);    // to call.planned
void launch_attend_extend(const CudaAttendCall& call, cudaStream_t stream);  // extend.cu

// Bytes of a plan: 12 warps a block at most (DecodeShape::warps).
inline constexpr int kMostDecodeWarps = 12;
inline constexpr std::size_t kPlannedPartBytes = 128;
inline constexpr std::size_t kPlannedItemBytes = 64;
std::size_t decode_plan_bytes();

// Scratch memory of each path; attend_call.cu gives each its own part, so they may overlap in time.
std::size_t decode_workspace_bytes(const Layout& layout, std::int32_t batch_size,
                                   std::int64_t query_tokens, std::int32_t q_heads);
std::size_t extend_workspace_bytes(const Layout& layout, std::int32_t batch_size,
                                   std::int64_t query_tokens, std::int32_t q_heads,
                                   std::int32_t max_query_len);

}  // namespace oscar::cuda
