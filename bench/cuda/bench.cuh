// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// What the benchmarks of single kernels share: device arrays of random contents, graphs, and times
// of calls that find nothing in the caches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "oscar/status.hpp"

namespace oscar::bench {

inline constexpr int kRuns = 30;

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}
inline void check(const oscar::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

__device__ inline std::uint32_t hashed(std::uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<std::uint32_t>(x ^ x >> 33);
}

static __global__ void fill_rows(__nv_bfloat16* rows, std::int64_t count) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    const float uniform = static_cast<float>(hashed(static_cast<std::uint64_t>(i) + 77)) * 0x1p-32f;
    rows[i] = __float2bfloat16(3.4f * (uniform - 0.5f));
  }
}

// 16384 instructions in a row: after it no other kernel's code is in a multiprocessor.
static __global__ void evict_code(float* sink) {
  float x[4] = {0.0f, 1.0f, 2.0f, static_cast<float>(threadIdx.x)};
#pragma unroll
  for (int i = 0; i < 16384; ++i) asm volatile("fma.rn.f32 %0, %0, %0, %0;\n" : "+f"(x[i % 4]));
  if (x[0] + x[1] + x[2] + x[3] == 12345.0f) *sink = x[0];
}

// Reads the buffer: its lines, unlike written ones, need not go to memory when others take their
// place. By ordinary loads: streaming ones would give way to each other, not push others out.
static __global__ void __launch_bounds__(512)
    read_flush(const uint4* data, std::int64_t count, uint4* sink) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  std::uint32_t sum = 0;
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    const uint4 x = data[i];
    sum ^= x.x ^ x.y ^ x.z ^ x.w;
  }
  if (sum == 0x12345678u) *sink = uint4{};
}

class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : bytes_(bytes) { check(cudaMalloc(&data_, bytes)); }
  Buffer(const std::vector<std::int32_t>& host) : Buffer(host.size() * sizeof(std::int32_t)) {
    check(cudaMemcpy(data_, host.data(), bytes_, cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }
  template <typename T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(data_);
  }
  [[nodiscard]] std::size_t size() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

// `work`, given the stream, as a graph: what a serving engine replays.
inline cudaGraphExec_t captured(cudaStream_t stream,
                                const std::function<void(cudaStream_t)>& work) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  work(stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  check(cudaGraphDestroy(graph));
  return exec;
}

// Median time in us of one replay of `work`, each after other data was read into the L2.
inline double median_us(const Buffer& flush, const std::function<void(cudaStream_t)>& work,
                        bool cold = true) {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const cudaGraphExec_t graph = captured(stream, work);
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&stop));
  std::vector<float> times;
  for (int i = 0; i < kRuns + 3; ++i) {
    if (cold) {
      evict_code<<<1056, 128, 0, stream>>>(flush.as<float>());
      read_flush<<<1056, 512, 0, stream>>>(
          flush.as<uint4>(), static_cast<std::int64_t>(flush.size() / 16), flush.as<uint4>());
    }
    check(cudaEventRecord(start, stream));
    check(cudaGraphLaunch(graph, stream));
    check(cudaEventRecord(stop, stream));
    check(cudaEventSynchronize(stop));
    float ms = 0.0f;
    check(cudaEventElapsedTime(&ms, start, stop));
    if (i >= 3) times.push_back(1000.0f * ms);
  }
  check(cudaEventDestroy(start));
  check(cudaEventDestroy(stop));
  check(cudaGraphExecDestroy(graph));
  check(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace oscar::bench
