// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The decode kernel: a persistent grid whose warps take equal parts of the line of units
// (plan.cuh), the merge of what the warps of a block hold at the end, and the outputs of the items
// that end there.
//
// Budget of k2v2, head_dim 128, up to 4 query columns, in SASS instructions a warp and group of
// four tiles (nvdisasm): 1170, or 293 a tile: scores 4 x 125 (64 LOP3, 16 HMMA and 16 HMUL2 each),
// unpacking 240, V 240 (24 LOP3 and 8 IMMA a tile), weights 110, fetching 50. 128 registers, 16
// warps on a multiprocessor. Reading a tile takes an H200 about 125 cycles of a multiprocessor, 500
// issue slots.
#pragma once

#include <cstdint>

#include "cuda/attend_segment.cuh"
#include "cuda/combine.cuh"

namespace oscar::cuda {

// Sums the partial results of the warps in `members` for one column into `target`; by one warp.
template <class S>
__device__ inline void merge_column(const CudaAttendCall& call, const DecodePlan& plan,
                                    const char* shared, unsigned members, int column,
                                    float* target) {
  constexpr int kWarps = S::warps(kArch);
  constexpr int kStride = S::kWarpBytes / 4;
  const int dim = S::head_dim(call);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto* partials = reinterpret_cast<const float*>(shared);
  const int max_at = plan.slot_columns * dim + column;
  const int sum_at = max_at + plan.slot_columns;
  // Lane w: the weight of warp w.
  const bool used = (members >> lane & 1) != 0;
  const float max = used ? partials[lane * kStride + max_at] : kNothing;
  const float most = max_over_lanes(max);
  const float weight = used ? exp2_fast(max - most) : 0.0f;
  float weights[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) weights[w] = __shfl_sync(kFullWarp, weight, w);
  const float sum = sum_over_lanes(used ? weight * partials[lane * kStride + sum_at] : 0.0f);
  if (lane == 0) {
    target[max_at] = most;
    target[sum_at] = sum;
  }
#pragma unroll 1
  for (int at = column * dim + 4 * lane; at < (column + 1) * dim; at += 128) {
    float4 total{};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if ((members >> w & 1) == 0) continue;
      const float4 x = *reinterpret_cast<const float4*>(partials + w * kStride + at);
      total.x = fmaf(weights[w], x.x, total.x);
      total.y = fmaf(weights[w], x.y, total.y);
      total.z = fmaf(weights[w], x.z, total.z);
      total.w = fmaf(weights[w], x.w, total.w);
    }
    *reinterpret_cast<float4*>(target + at) = total;
  }
}

// The last segments of the warps of a block: kinds[w], -1 where warp w had no unit.
template <class S>
struct BlockEnd {
  char* shared;
  int* kinds;
  int* complete;  // [warp]: its segment, merged, was the last one of its item

  [[nodiscard]] __device__ WarpState<S>& state(int warp) const {
    return *reinterpret_cast<WarpState<S>*>(shared + S::warps(kArch) * S::kWarpBytes +
                                            warp * S::kStateBytes);
  }
};

template <class S>
__device__ inline void merge_block(const CudaAttendCall& call, const DecodePlan& plan,
                                   const BlockEnd<S>& block) {
  constexpr int kWarps = S::warps(kArch);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int own = lane < kWarps ? block.kinds[lane] : -1;
  const int units = own >= 0 ? block.state(lane).units : 0;
  unsigned left = __ballot_sync(kFullWarp, own >= 0);
  if (left == 0) return;  // the same in all warps
  unsigned leads = 0;     // units of the kind whose first warp this is
#pragma unroll 1
  for (int first = 0; left != 0; first += plan.slot_columns) {
    const int leader = __ffs(static_cast<int>(left)) - 1;
    const int kind = __shfl_sync(kFullWarp, own, leader);
    const unsigned members = __ballot_sync(kFullWarp, own == kind);
    float* target = slot_of(call, plan, plan.merged + static_cast<int>(blockIdx.x) + kind);
    // Columns of all kinds in turn to the warps.
#pragma unroll 1
    for (int column = (warp + kWarps - first % kWarps) % kWarps; column < plan.slot_columns;
         column += kWarps) {
      merge_column<S>(call, plan, block.shared, members, column, target);
    }
    const unsigned sum =
        __reduce_add_sync(kFullWarp, own == kind ? static_cast<unsigned>(units) : 0u);
    if (leader == warp) leads = sum;
    left &= ~members;
  }
  __syncthreads();
  if (lane == 0) {
    block.complete[warp] =
        leads > 0 && add_units<S>(call, block.state(warp), static_cast<int>(leads));
  }
  __syncthreads();
  unsigned complete = __ballot_sync(kFullWarp, lane < kWarps && block.complete[lane % kWarps] != 0);
#pragma unroll 1
  for (int first = 0; complete != 0; first += S::kColumns, complete &= complete - 1) {
    const int from = __ffs(static_cast<int>(complete)) - 1;
#pragma unroll 1
    for (int column = 0; column < S::kColumns; ++column) {
      if ((first + column) % kWarps != warp) continue;
      combine_column<S>(call, plan, block.state(from), column);
    }
  }
}

// The segment in `state`.
template <class S>
__device__ inline void attend_segment(const CudaAttendCall& call, const DecodePlan& plan,
                                      const Lane& lane, char* warp, WarpState<S>& state) {
  const DecodeSequence& s = state.item.sequence;
  const int begin = state.begin;
  const int end = begin + state.units;
  const bool exact = begin < s.exact_units;
  const bool is_last = state.next == state.last;
  float* partial = is_last ? reinterpret_cast<float*>(warp) : slot_of(call, plan, state.kind);
  if (exact) {
    // Without the first of the units that stand for 32 tokens: an empty result.
    const int weight = exact_weight(state.line.level);
    attend_exact_any<S>(call, plan, lane, (begin + weight - 1) / weight,
                        (end + weight - 1) / weight, warp, state, partial);
  } else {
    const int shift = tile_shift(state.line.level);
    const int unit = (s.first_tile >> shift) - s.exact_units;
    attend_packed_segment<S>(call, plan, lane, max((unit + begin) << shift, s.first_tile),
                             min((unit + end) << shift, s.packed_high), warp, state, partial);
  }
  if (is_last) return;
  __syncwarp();
  bool complete = false;
  if (lane.index == 0) complete = add_units<S>(call, state, state.units);
  if (!__any_sync(kFullWarp, complete)) return;
#pragma unroll 1
  for (int column = 0; column < S::kColumns; ++column) {
    combine_column<S>(call, plan, state, column);
  }
}

// The units first .. last - 1 of the line; returns the kind of the last segment, -1 without one.
template <class S>
__device__ inline int attend_part(const CudaAttendCall& call, const DecodePlan& plan,
                                  const DecodeSums* chunks, const DecodeScan& scan,
                                  const DecodeLine& line, const Lane& lane, int number, char* warp,
                                  WarpState<S>& state) {
  int unit = line.start(number);
  int last = line.start(number + 1);
  if (unit >= last) return -1;
  if (lane.index == 0) state.line = line;
  __syncwarp();
  DecodePlace place = find_unit(call, plan, chunks, scan, unit, lane.index);
#pragma unroll 1
  while (unit < last && place.b < call.batch.size) {
    const DecodeSequence s = decode_sequence(call, plan, place.b, state.line.level);
    const int per_item = s.item_units();
    const int items = call.layout.kv_heads * s.blocks;
    const int at = unit - place.start.unit;
    if (at >= items * per_item) {
      place = {place.b + 1, {place.start.unit + items * per_item, place.start.kind + 2 * items}};
      continue;
    }
    const int item = at / per_item;
    const int begin = at - item * per_item;
    const bool exact = begin < s.exact_units;
    const int units = min(last - unit, (exact ? s.exact_units : per_item) - begin);
    if (lane.index == 0) {
      state.item = {s, item / s.blocks, item % s.blocks * plan.columns};
      state.kind = place.start.kind + 2 * item + (exact ? 0 : 1);
      state.begin = begin;
      state.units = units;
      state.next = unit + units;
      state.last = last;
      state.b = place.b;
      state.start = place.start;
    }
    __syncwarp();
    attend_segment<S>(call, plan, lane, warp, state);
    unit = state.next;
    last = state.last;
    place = {state.b, state.start};
    __syncwarp();
  }
  return state.kind;
}

template <class S>
__global__ void __launch_bounds__(32 * S::warps(kArch), 1)
    attend_decode(const __grid_constant__ CudaAttendCall call,
                  const __grid_constant__ DecodePlan plan) {
  extern __shared__ __align__(128) char shared[];
  __shared__ DecodeSums chunks[kMaxSharedChunks];
  __shared__ int kinds[S::warps(kArch)];
  __shared__ int complete[S::warps(kArch)];
  static_assert(sizeof(WarpState<S>) <= S::kStateBytes);
  const int index = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const Lane lane{index, index / 4, index % 4};
  const BlockEnd<S> block{shared, kinds, complete};
  const DecodeScan scan = plan_line(call, plan, chunks);
  const DecodeLine line = decode_line(plan, scan.units, scan.level);
  const int number = static_cast<int>(blockIdx.x) * S::warps(kArch) + warp;
  const int kind = attend_part<S>(call, plan, chunks, scan, line, lane, number,
                                  shared + warp * S::kWarpBytes, block.state(warp));
  if (lane.index == 0) kinds[warp] = kind;
  __syncthreads();
  merge_block<S>(call, plan, block);
}

// Before attend_decode, which waits for it only where an item ends: no units are done.
static __global__ void clear_tickets(uint4* tickets, int count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    tickets[i] = uint4{};
  }
}

}  // namespace oscar::cuda
