// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/device.hpp"
#include "cuda/read_bound.hpp"

namespace oscar::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;  // in flight a thread

__global__ void __launch_bounds__(kThreads)
    read_bound(const ulonglong2* data, std::size_t count, unsigned long long* total) {
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * kThreads;
  std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  unsigned long long sum = 0;
  for (; i + (kLoads - 1) * stride < count; i += kLoads * stride) {
    ulonglong2 x[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) x[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) sum += x[j].x + x[j].y;
  }
  for (; i < count; i += stride) sum += data[i].x + data[i].y;
  for (int d = 16; d > 0; d /= 2) sum += __shfl_down_sync(~0u, sum, d);
  __shared__ unsigned long long sums[kThreads / 32];
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) sum += sums[warp];
  atomicAdd(total, sum);
}

}  // namespace

void read_bytes(const void* data, std::size_t bytes, std::uint64_t* total, void* stream) {
  const std::size_t count = bytes / sizeof(ulonglong2);
  // All threads that fit at once, fewer where one load each is enough.
  const std::size_t most = static_cast<std::size_t>(multiprocessors()) * (2048 / kThreads);
  const std::size_t blocks = std::min(most, (count + kThreads - 1) / kThreads);
  if (blocks == 0) return;
  read_bound<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const ulonglong2*>(data), count, reinterpret_cast<unsigned long long*>(total));
}

}  // namespace oscar::cuda
