// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// cuda::append: one launch for a decode step or a prompt chunk.
#include <algorithm>
#include <string>

#include "core/check.hpp"
#include "cuda/append_plain.cuh"
#include "cuda/append_step.cuh"
#include "cuda/append_warp.cuh"
#include "cuda/check.hpp"
#include "cuda/device.hpp"
#include "oscar/cuda.hpp"

namespace oscar::cuda {
namespace {

constexpr std::int64_t kMostRounds = 8;        // slots of a tile's two warps, one after the other
constexpr std::int64_t kManyBlocks = 1 << 13;  // fewer blocks than that: one slot each
constexpr std::int64_t kManyFed = 1056;     // tiles with feedback that an H200 works on at a time
constexpr std::int64_t kFewFed = 384;       // with up to so many, append_step.cuh's schedule
constexpr int kFewestFed = 48;              // with up to so many, two blocks a tile of it
constexpr std::int32_t kMostHeads = 65535;  // of a grid's second dimension

// Feedback of few tiles. False where the device has too little shared memory.
template <typename T, int kHeadDim, int kKeyBits, int kValueBits>
bool launch_step(const CudaAppendCall& call, int slots, cudaStream_t stream) {
  constexpr auto kShared = static_cast<int>(sizeof(StepShared<T, kHeadDim>));
  if (kShared > most_shared_bytes()) return false;
  const auto kernel = append_step_kernel<T, kHeadDim, kKeyBits, kValueBits>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  const int heads = call.layout.kv_heads;
  // One of a tile's two blocks may write the ring while the other still reads rows there: they must
  // be different ones.
  const bool apart = call.layout.ring_tokens() >= 64 && call.k.tokens <= kTileTokens;
  const int log_parts = apart && slots * heads <= kFewestFed ? 1 : 0;
  const dim3 grid((slots << log_parts) + (slots + kStepTiles - 1) / kStepTiles, heads);
  kernel<<<grid, kStepThreads, kShared, stream>>>(call, slots, log_parts);
  return true;
}

// False where the device has too little shared memory.
template <typename T, int kHeadDim, int kKeyBits, int kValueBits, bool kFed>
bool launch_warp(const CudaAppendCall& call, cudaStream_t stream) {
  constexpr auto kShared = static_cast<int>(sizeof(AppendSharedOf<T, kHeadDim, kFed>));
  const auto kernel = append_warp_kernel<T, kHeadDim, kKeyBits, kValueBits, kFed>;
  const auto slots = static_cast<int>(tile_slots(call.k.tokens, call.batch.size));
  const std::int64_t tiles = static_cast<std::int64_t>(slots) * call.layout.kv_heads;
  if constexpr (kFed) {
    if (tiles <= kFewFed && launch_step<T, kHeadDim, kKeyBits, kValueBits>(call, slots, stream)) {
      return true;
    }
    if (kShared > most_shared_bytes()) return false;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  }
  // As many blocks an SM as the registers allow need most of the shared memory (a hint).
  static const cudaError_t hinted =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  (void)hinted;
  const std::int64_t waves = kFed ? (tiles + kManyFed - 1) / kManyFed : 2 * tiles / kManyBlocks;
  const auto rounds = static_cast<int>(std::clamp<std::int64_t>(waves, 1, kMostRounds));
  const int block_slots = rounds * kAppendTiles<kFed>;
  const dim3 grid((slots + block_slots - 1) / block_slots, call.layout.kv_heads, 2);
  kernel<<<grid, kTileThreads * kAppendTiles<kFed>, kShared, stream>>>(call, slots, rounds);
  return true;
}

template <typename T, int kHeadDim, int kKeyBits, int kValueBits>
bool launch_warp(const CudaAppendCall& call, cudaStream_t stream) {
  return call.cache.feedback == nullptr
             ? launch_warp<T, kHeadDim, kKeyBits, kValueBits, false>(call, stream)
             : launch_warp<T, kHeadDim, kKeyBits, kValueBits, true>(call, stream);
}

template <typename T, int kHeadDim>
bool launch_warp(const CudaAppendCall& call, cudaStream_t stream) {
  const Format format = call.layout.format;
  if (format == kK2V2) return launch_warp<T, kHeadDim, 2, 2>(call, stream);
  if (format == kK4V2) return launch_warp<T, kHeadDim, 4, 2>(call, stream);
  return launch_warp<T, kHeadDim, 4, 4>(call, stream);
}

// False where there is no such kernel for the head_dim.
template <typename T>
bool launch_warp(const CudaAppendCall& call, cudaStream_t stream) {
  switch (call.layout.head_dim) {
    case 64:
      return launch_warp<T, 64>(call, stream);
    case 128:
      return launch_warp<T, 128>(call, stream);
    case 256:
      return launch_warp<T, 256>(call, stream);
    default:
      return false;
  }
}

void launch_plain(const CudaAppendCall& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tile_slots(call.k.tokens, call.batch.size)),
                  call.layout.kv_heads, 2);
  append_plain_kernel<<<grid, kPlainThreads, plain_shared_bytes(call.layout.head_dim), stream>>>(
      call);
}

Status check(const CudaAppendCall& call) {
  OSCAR_TRY(check_layout(call.layout));
  if (call.layout.kv_heads > kMostHeads) {
    return {StatusCode::kUnsupported, "kv_heads is " + std::to_string(call.layout.kv_heads) +
                                          ", must be at most 65535 on a CUDA device"};
  }
  OSCAR_TRY(check_device_rows("k", call.k, call.k.tokens, call.layout.kv_heads));
  OSCAR_TRY(check_device_rows("v", call.v, call.k.tokens, call.layout.kv_heads));
  return check_device_cache(call.cache, call.batch, call.k.tokens);
}

}  // namespace

void launch_append(const CudaAppendCall& call, cudaStream_t stream) {
  const DType dtype = call.layout.exact_dtype;
  const bool one_dtype = call.k.dtype == dtype && call.v.dtype == dtype;
  if (one_dtype && dtype == DType::kBF16 && launch_warp<__nv_bfloat16>(call, stream)) return;
  if (one_dtype && dtype == DType::kF16 && launch_warp<__half>(call, stream)) return;
  launch_plain(call, stream);
}

Status append(const Layout& layout, const CacheView& cache, const Batch& batch, const ConstRows& k,
              const ConstRows& v, AppendPart part, void* stream, std::uint64_t* fault) noexcept {
  const CudaAppendCall call{layout, cache, batch, k, v, part, fault};
  OSCAR_TRY(check(call));
  if (k.tokens == 0) return {};
  launch_append(call, static_cast<cudaStream_t>(stream));
  return launched("append");
}

}  // namespace oscar::cuda
