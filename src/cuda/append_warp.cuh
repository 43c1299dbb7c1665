// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// append for head_dim 64, 128 and 256 and 16-bit rows of the exact memory's dtype: two warps a tile
// and side. With error feedback the tiles of a block share its weights.
#pragma once

#include "cuda/append_tile.cuh"

namespace oscar::cuda {

// Asks for the rows of the tile after this one: one line a thread, or two.
template <Side kSide, typename T, int kHeadDim>
__device__ inline void prefetch_next(const CudaAppendCall& call, const TileTask& task,
                                     TileLane place) {
  const ConstRows& rows = kSide == Side::kKey ? call.k : call.v;
  const int thread = place.thread();
  const int token = (task.index + 1) * kTileTokens + thread / 2;
  if (token >= task.span.end) return;
  const T* row = static_cast<const T*>(rows.data) + task.head * rows.head_stride +
                 (task.span.first_row + token - task.span.cached) * rows.token_stride;
#pragma unroll
  for (int at = 0; at < kHeadDim; at += 128) {
    const T* line = row + at + thread % 2 * 64;
    if (at + thread % 2 * 64 < kHeadDim) asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
  }
}

// What the tiles of a block use together.
template <int kHeadDim, int kSplits, int kTiles, bool kFed>
struct AppendShared {
  alignas(16) std::uint32_t factors[kSplits * kHeadDim / 2];
  alignas(16) KeyExchange<kHeadDim> exchange[kTiles];
};
template <int kHeadDim, int kSplits, int kTiles>
struct AppendShared<kHeadDim, kSplits, kTiles, true>
    : AppendShared<kHeadDim, kSplits, kTiles, false> {
  alignas(16) FeedbackWeights<kHeadDim> weights;
};

template <Side kSide, typename T, int kHeadDim, int kBits, bool kFed, class Shared>
__device__ inline void pack_tile(const CudaAppendCall& call, const TileTask& task, TileLane place,
                                 Shared& shared) {
  constexpr bool kKey = kSide == Side::kKey;
  constexpr bool kPairs = !kKey && kValuePairs<kHeadDim, kBits>;
  // Without a balance only the first part of a factor is not 0: the sums are the same.
  constexpr int kSplits = kKey ? kBalanceSplits<T> : 1;
  const TileLayout layout{kHeadDim, call.layout.format};
  uint4 raw[2][kHeadDim / 32];
  load_rows<kSide, T, kHeadDim>(call, task, place, raw);
  prefetch_next<kSide, T, kHeadDim>(call, task, place);
  Rotated<kHeadDim> y;
  rotate_rows<kPairs, T, kHeadDim, kSplits>(raw, shared.factors, place.lane, y);
  constexpr float kNorm = hadamard_norm(kHeadDim) / kFactorScale<T, kHeadDim>;
  if constexpr (kNorm != 1.0f) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) y[i / 8][i / 4 % 2][i % 4] *= kNorm;
  }
  if constexpr (kKey) {
    if (const float* center = head_center(call.layout, call.cache, task.head); center != nullptr) {
      float own[kHeadDim / 8];
      load_center<kHeadDim>(center, place, own);
      subtract_center<kHeadDim>(own, y);
    }
  }
  if constexpr (!kKey) {
    value_tile<kHeadDim, kBits>(y, place, layout, task.out);
  } else if constexpr (kFed) {
    key_tile<kHeadDim, kBits, true>(y, place, layout, &shared.weights, shared.exchange[place.tile],
                                    task.out);
  } else {
    key_tile<kHeadDim, kBits, false>(y, place, layout, nullptr, shared.exchange[place.tile],
                                     task.out);
  }
}

// The slots from `slot` on that belong to one sequence.
struct SlotRun {
  AppendSpan span;
  int nth;    // of the sequence's slots
  int tiles;  // that the call completes
  int next;   // slot of the next sequence
};
__device__ inline SlotRun slot_run(const CudaAppendCall& call, int slot) {
  int first = 0;
  int next = 0;
  const int b = sequence_of_slot(call.batch, slot, &first, &next);
  const AppendSpan span = append_span(call, b);
  const int tiles = call.part == AppendPart::kRemember ? 0 : span.tiles();
  return {span, slot - first, tiles, max(next, slot + 1)};
}

__device__ inline bool completes_a_tile(const CudaAppendCall& call, int slot, int stop) {
  while (slot < stop) {
    const SlotRun run = slot_run(call, slot);
    if (run.nth < run.tiles) return true;
    slot = run.next;
  }
  return false;
}

// Slots slot .. stop - 1, one after the other.
template <Side kSide, typename T, int kHeadDim, int kBits, bool kFed, class Shared>
__device__ inline void append_slots(const CudaAppendCall& call, int slot, int stop, TileLane place,
                                    Shared& shared) {
  constexpr bool kKey = kSide == Side::kKey;
  const int head = static_cast<int>(blockIdx.y);
  const auto prepare = [&] {
    const bool balanced = kKey && call.cache.balance != nullptr;
    make_factors<T, kHeadDim, kKey ? kBalanceSplits<T> : 1>(
        balanced ? call.cache.balance + head * kHeadDim : nullptr, shared.factors,
        static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
    if constexpr (kFed && kKey) {
      load_weights<kHeadDim>(head_feedback(call.layout, call.cache, head), shared.weights);
    }
    __syncthreads();
  };
  // A decode step seldom completes a tile: factors are made when they are used.
  bool ready = false;
  if constexpr (kFed) {
    if (__syncthreads_or(completes_a_tile(call, slot, stop) ? 1 : 0) != 0) prepare();
    ready = true;
  }
  while (slot < stop) {
    const SlotRun run = slot_run(call, slot);
    TileTask task{run.span, head, 0, nullptr};
    for (int i = run.nth; i < min(run.nth + stop - slot, run.tiles); ++i) {
      task.index = task.span.first_tile() + i;
      task.out = tile_address(call.layout, call.cache, run.span.b, head, task.index);
      if (task.out == nullptr) continue;
      if (!ready) prepare();
      ready = true;
      pack_tile<kSide, T, kHeadDim, kBits, kFed>(call, task, place, shared);
    }
    if (run.nth == 0 && call.part != AppendPart::kPack) {
      place.sync();  // the only tile that reads the ring is this one: it has been read
      remember(call, task.span, kSide, head, place.thread(), kTileThreads);
    }
    slot = run.next;
  }
}

// Blocks an SM that registers must allow.
template <int kHeadDim, bool kFed>
inline constexpr int kAppendBlocks = kFed              ? (kHeadDim == 256 ? 1 : 2)
                                     : kHeadDim == 64  ? 14
                                     : kHeadDim == 128 ? 10
                                                       : 6;
template <bool kFed>
inline constexpr int kAppendTiles = kFed ? 4 : 1;  // of a block, side by side

template <typename T, int kHeadDim, bool kFed>
using AppendSharedOf = AppendShared<kHeadDim, kBalanceSplits<T>, kAppendTiles<kFed>, kFed>;

// Grid (slots / rounds / tiles side by side, kv_heads, 2 sides). Shared memory: AppendSharedOf.
template <typename T, int kHeadDim, int kKeyBits, int kValueBits, bool kFed>
__global__ void __launch_bounds__(kTileThreads* kAppendTiles<kFed>, kAppendBlocks<kHeadDim, kFed>)
    append_warp_kernel(const __grid_constant__ CudaAppendCall call, int slots, int rounds) {
  extern __shared__ float4 append_shared[];
  auto& shared = *reinterpret_cast<AppendSharedOf<T, kHeadDim, kFed>*>(append_shared);
  const int thread = static_cast<int>(threadIdx.x);
  const TileLane place{thread % kWarp, thread / kWarp % 2, kFed ? thread / kTileThreads : 0};
  const int slot = (static_cast<int>(blockIdx.x) * kAppendTiles<kFed> + place.tile) * rounds;
  const int stop = min(slot + rounds, slots);
  if (blockIdx.z == 0) {
    append_slots<Side::kKey, T, kHeadDim, kKeyBits, kFed>(call, slot, stop, place, shared);
  } else {
    append_slots<Side::kValue, T, kHeadDim, kValueBits, kFed>(call, slot, stop, place, shared);
  }
}

}  // namespace oscar::cuda
