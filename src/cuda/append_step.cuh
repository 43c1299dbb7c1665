// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// append with error feedback of so few tiles that the time of one counts, as in a decode step: a
// block of eight warps for a K tile (or a part of its tokens), and the V tiles of four slots as in
// append_warp.cuh. The bytes are those of append_warp.cuh.
#pragma once

#include "cuda/append_warp.cuh"
#include "cuda/feedback_step.cuh"

namespace oscar::cuda {

inline constexpr int kStepThreads = 256;
inline constexpr int kStepTiles = kStepThreads / kTileThreads;  // V tiles of a block
inline constexpr int kRowThreads = 128;  // load and rotate a K tile's rows, the others its weights
inline constexpr int kFactorsBarrier = 1;

template <typename T, int kHeadDim>
struct StepShared {
  alignas(16) std::uint32_t factors[kBalanceSplits<T> * kHeadDim / 2];
  uint4 largest[kStepThreads / kWarp];  // of a warp: bits of step and |mid|, then norm index
  FeedbackStep<kHeadDim> feedback;
};

// y of two tokens a lane (place.block) becomes z, in shared memory; returns the norm index of token
// 2 block + g % 2 of the lane's quad.
template <int kHeadDim>
__device__ inline int scale_columns(Rotated<kHeadDim, 1>& y, TileLane place,
                                    FeedbackStep<kHeadDim>& shared) {
  float sums[2];
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    sums[b] = sum_of_squares<kHeadDim>(
        [&](int x, int line) { return y[x + line / 2 * 2][0][line % 2 * 2 + b]; });
  }
  const float own = place.g() % 2 == 0 ? sums[0] : sums[1];
  const int index = norm_index(own * (1.0f / static_cast<float>(kHeadDim)));
  const float mine = inverse_scale_of(index, kTokenNormOffset);
  const float inverses[2] = {__shfl_sync(kAllLanes, mine, place.q()),
                             __shfl_sync(kAllLanes, mine, place.q() + 4)};
  const int channel = place.g() % 4 + 8 * (place.g() / 4);
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) {
    const int line = i / 2;
    const float* pair = &y[i % 2 + line / 2 * 2][0][line % 2 * 2];
    *reinterpret_cast<float2*>(
        &shared.columns[16 * line + channel + 4 * (i % 2)][4 * place.quad() + 2 * place.block]) =
        make_float2(pair[0] * inverses[0], pair[1] * inverses[1]);
  }
  return index;
}

// Scale and mid of all channels, by all threads of the block; norm: of the threads that have rows.
// out: null where another block writes them.
template <int kBits, typename T, int kHeadDim>
__device__ inline void step_grids(int norm, TileLane place, const TileLayout& layout,
                                  std::uint8_t* out, StepShared<T, kHeadDim>& shared) {
  constexpr int kShare = kStepThreads / kHeadDim;  // threads of a channel
  const int thread = static_cast<int>(threadIdx.x);
  const int channel = thread / kShare;
  const auto* column = reinterpret_cast<const float4*>(shared.feedback.columns[channel]);
  float low = INFINITY;
  float high = -INFINITY;
#pragma unroll
  for (int i = 0; i < 8 / kShare; ++i) {
    // Neighbouring channels start at different quads: no bank conflicts.
    const float4 four = column[((i + channel) * kShare + thread % kShare) % 8];
    low = fminf(low, fminf(fminf(four.x, four.y), fminf(four.z, four.w)));
    high = fmaxf(high, fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)));
  }
#pragma unroll
  for (int distance = 1; distance < kShare; distance *= 2) {
    low = fminf(low, __shfl_xor_sync(kAllLanes, low, distance));
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, distance));
  }
  const float step = key_step<kBits>(low, high, true);
  const float mid = middle(low, high);
  // Neither is negative: their bits are in the order of the numbers.
  const std::uint32_t warp_step = __reduce_max_sync(kAllLanes, __float_as_uint(step));
  const std::uint32_t warp_mid = __reduce_max_sync(kAllLanes, __float_as_uint(fabsf(mid)));
  const std::uint32_t warp_norm = __reduce_max_sync(kAllLanes, static_cast<std::uint32_t>(norm));
  if (place.lane == 0) {
    shared.largest[thread / kWarp] = make_uint4(warp_step, warp_mid, warp_norm, 0);
  }
  __syncthreads();
  uint4 top = shared.largest[0];
#pragma unroll
  for (int i = 1; i < kStepThreads / kWarp; ++i) {
    const uint4 next = shared.largest[i];
    top = make_uint4(max(top.x, next.x), max(top.y, next.y), max(top.z, next.z), 0);
  }
  const KeyTop keys = key_top<kBits>(__uint_as_float(top.x), __uint_as_float(top.y));
  const int top_norm = static_cast<int>(top.z);
  Grid grid;
  float stored = 0.0f;
  const std::uint32_t params = key_params<kBits>(step, mid, keys, &grid, &stored);
  grid.inverse *= kCodeStep<kBits>;
#pragma unroll 1
  for (int i = thread % kShare; i < 4; i += kShare) {
    put_grid<kBits>(grid, stored / kCodeStep<kBits>, channel, i, shared.feedback);
  }
  __syncthreads();
  if (out == nullptr) return;
  if (thread % kShare == 0) {
    out[layout.k_params_offset() + channel] = static_cast<std::uint8_t>(params);
  }
  if (thread < kRowThreads && place.g() < 2) {
    const int position = 4 * place.quad() + 2 * place.block + place.g();
    out[layout.k_norms_offset() + position] =
        norm_byte(norm, top_norm, unit_bits(keys, top_norm), position);
  }
  for (int i = layout.used_bytes() + thread; i < layout.tile_bytes(); i += kStepThreads) out[i] = 0;
}

// The rows of a K tile as z in shared memory and the weights beside them; returns the norm index of
// the thread's token (scale_columns), 0 for the threads without rows.
template <typename T, int kHeadDim>
__device__ inline int step_columns(const CudaAppendCall& call, const TileTask& task, TileLane place,
                                   StepShared<T, kHeadDim>& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= kRowThreads) {
    const int rank = thread - kRowThreads;
    const float* balance = call.cache.balance;
    make_factors<T, kHeadDim, kBalanceSplits<T>>(
        balance == nullptr ? nullptr : balance + task.head * kHeadDim, shared.factors, rank,
        kStepThreads - kRowThreads);
    arrive_at(kFactorsBarrier, kStepThreads);
    const std::uint16_t* feedback = head_feedback(call.layout, call.cache, task.head);
    load_later<kStepThreads - kRowThreads>(feedback, rank, shared.feedback);
    load_near<kStepThreads - kRowThreads>(feedback, rank, shared.feedback);
    return 0;
  }
  const float* center = head_center(call.layout, call.cache, task.head);
  float own_center[kHeadDim / 8];
  if (center != nullptr) load_center<kHeadDim>(center, place, own_center);
  uint4 raw[1][kHeadDim / 32];
  load_rows<Side::kKey, T, kHeadDim>(call, task, place, raw);
  wait_at(kFactorsBarrier, kStepThreads);
  Rotated<kHeadDim, 1> y;
  rotate_rows<false, T, kHeadDim, kBalanceSplits<T>>(raw, shared.factors, place.lane, y);
  constexpr float kNorm = hadamard_norm(kHeadDim) / kFactorScale<T, kHeadDim>;
  if constexpr (kNorm != 1.0f) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) y[i / 4][0][i % 4] *= kNorm;
  }
  if (center != nullptr) subtract_center<kHeadDim>(own_center, y);
  return scale_columns<kHeadDim>(y, place, shared.feedback);
}

// Packs part `index` of 2^log_parts of a K tile's tokens, once they are z and the weights are
// there.
template <int kBits, typename T, int kHeadDim>
__device__ inline void pack_part(int index, int log_parts, std::uint8_t* codes,
                                 StepShared<T, kHeadDim>& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const StepPart part{(8 >> log_parts) * index, 3 - log_parts};
  // Warps 0 and 4 share a scheduler, which the rounding warp is to have for itself.
  const int updater = warp < 4 ? warp - 1 : warp == 5 ? 3 : part.updaters();
  if (warp == 0) {
    round_channels<kHeadDim, kBits>(part, lane, shared.feedback, codes);
  } else if (updater < part.updaters()) {
    add_errors<kHeadDim>(part, updater * kWarp + lane, shared.feedback);
  }
}

// K of one slot, or a part of its tokens.
template <typename T, int kHeadDim, int kBits>
__device__ inline void step_keys(const CudaAppendCall& call, int slot, int index, int log_parts,
                                 StepShared<T, kHeadDim>& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int head = static_cast<int>(blockIdx.y);
  const SlotRun run = slot_run(call, slot);
  if (run.nth < run.tiles) {
    TileTask task{run.span, head, run.span.first_tile() + run.nth, nullptr};
    task.exact_slot =
        call.cache.slot[static_cast<std::int64_t>(run.span.b) * call.layout.exact_blocks];
    // Nothing waits for the page before the tile is written.
    task.out = tile_address(call.layout, call.cache, run.span.b, head, task.index);
    const TileLane place{lane, warp % 2, 0, warp / 2 % 2};
    const int norm = step_columns<T, kHeadDim>(call, task, place, shared);
    __syncthreads();
    const TileLayout layout{kHeadDim, call.layout.format};
    step_grids<kBits>(norm, place, layout, index == 0 ? task.out : nullptr, shared);
    if (task.out != nullptr) {
      pack_part<kBits>(index, log_parts, task.out + layout.k_codes_offset(), shared);
    }
  }
  constexpr int kCopying = 2 * kWarp;  // the last two warps: they do not add errors
  if (warp >= 6 && index == 0 && run.nth == 0 && call.part != AppendPart::kPack) {
    remember(call, run.span, Side::kKey, head, static_cast<int>(threadIdx.x) % kCopying, kCopying);
  }
}

// Grid (2^log_parts x slots for K, then slots / 4 for V; kv_heads). Shared memory: StepShared.
template <typename T, int kHeadDim, int kKeyBits, int kValueBits>
__global__ void __launch_bounds__(kStepThreads, kHeadDim == 256 ? 1 : 2)
    append_step_kernel(const __grid_constant__ CudaAppendCall call, int slots, int log_parts) {
  extern __shared__ float4 append_shared[];
  auto& shared = *reinterpret_cast<StepShared<T, kHeadDim>*>(append_shared);
  const int block = static_cast<int>(blockIdx.x);
  const int parts = 1 << log_parts;
  if (block < parts * slots) {
    step_keys<T, kHeadDim, kKeyBits>(call, block >> log_parts, block & (parts - 1), log_parts,
                                     shared);
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  const TileLane place{thread % kWarp, thread / kWarp % 2, thread / kTileThreads};
  const int slot = (block - parts * slots) * kStepTiles + place.tile;
  append_slots<Side::kValue, T, kHeadDim, kValueBits, true>(call, slot, min(slot + 1, slots), place,
                                                            shared);
}

}  // namespace oscar::cuda
