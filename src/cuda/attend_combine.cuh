// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The kernel behind attend_decode: items that several blocks have units of. Its blocks start while
// those of attend_decode are at work, find their item and wait for the end.
#pragma once

#include <cstdint>

#include "cuda/combine.cuh"
#include "cuda/plan_part.cuh"

namespace oscar::cuda {

inline constexpr int kCombineWarps = 8;  // at most; a column each

// Adds the merged parts of up to 32 blocks, from slot `first` on.
template <class S>
__device__ inline void add_merged(const CudaAttendCall& call, const DecodePlan& plan, int first,
                                  int count, int column, int lane, RowSums<S>& row) {
  constexpr int kChannels = RowSums<S>::kChannels;
  constexpr int kTogether = 64 / kChannels;  // loads under way
  const int dim = S::head_dim(call);
  const float* own = slot_of(call, plan, first + min(lane, count - 1)) + plan.slot_columns * dim;
  const float most = lane < count ? __ldcg(own + column) : kNothing;
  const float sum = __ldcg(own + plan.slot_columns + column);
  float weight = 0.0f;
#pragma unroll 1
  for (int begin = 0; begin < count; begin += kTogether) {
    float x[kTogether][kChannels];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {  // past the end the last one, with weight 0
      const float* slot = slot_of(call, plan, first + min(begin + j, count - 1));
      load_part<S, true>(slot + column * dim, dim, lane, x[j]);
    }
    if (begin == 0) {  // the maxima have come beside the first rows
      row.raise(max_over_lanes(most));
      weight = lane < count ? exp2_fast(most - row.max) : 0.0f;
      row.sum += sum_over_lanes(weight * sum);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const float part = __shfl_sync(kFullWarp, weight, (begin + j) % 32);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) row.x[k] = fmaf(part, x[j][k], row.x[k]);
    }
  }
}

// The block's item without a plan: out of the way of what runs with one.
static __device__ __noinline__ SplitItem find_own_item(const CudaAttendCall& call,
                                                       const DecodePlan& plan, int block) {
  __shared__ PlanTable table;
  const int warps = static_cast<int>(blockDim.x) / 32;
  return find_split_item(call, plan, table, find_line(call, plan, table, warps), block,
                         fresh_lane().index);
}

template <class S>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_items(const __grid_constant__ CudaAttendCall call,
                  const __grid_constant__ DecodePlan plan) {
  const int lane = fresh_lane().index;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int block = static_cast<int>(blockIdx.x);
  const SplitItem split = call.planned != nullptr ? planned_items(call, plan)[block].split
                                                  : find_own_item(call, plan, block);
  wait_for_kernel_before();  // every block: whoever follows this kernel follows attend_decode, too
  const ItemEnd& end = split.end;
  if (end.item < 0) return;
#pragma unroll 1
  for (int column = fresh_warp(); column < plan.slot_columns; column += warps) {
    RowSums<S> row{kNothing, 0.0f, {}};
#pragma unroll 1
    for (int b = block; b <= split.last_block; b += 32) {
      add_merged(call, plan, plan.merged + b + end.item, min(split.last_block + 1 - b, 32), column,
                 lane, row);
    }
    store_row(call, plan, end, column, lane, row);
  }
}

}  // namespace oscar::cuda
