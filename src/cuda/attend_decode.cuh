// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The decode kernel: a persistent grid whose warps take equal parts of the line of units
// (plan.cuh), the merge of what the warps of a block hold at the end, and the outputs of the items
// that end there.
//
// Budget of k2v2, head_dim 128, up to 4 query columns, in SASS instructions a warp and group of
// four tiles (nvdisasm): 1170, or 293 a tile: scores 4 x 125 (64 LOP3, 16 HMMA and 16 HMUL2 each),
// unpacking 240, V 240 (24 LOP3 and 8 IMMA a tile), weights 110, fetching 50. 156 registers, 8 or
// 12 warps on a multiprocessor. Reading a tile takes an H200 about 125 cycles of a multiprocessor,
// 500 issue slots, an H100 about 180.
//
// Where code stands matters: between other kernels a call finds none of it in a cache, and what is
// more than about 56 KB behind the kernel's start takes a warp twice to seven times as long then
// (docs/performance.md). So what a planned call of 16-bit rows goes through stands first, and the
// rest is functions that are not inlined, which come behind the kernel.
#pragma once

#include <cstdint>

#include "cuda/attend_exact_segment.cuh"
#include "cuda/attend_segment.cuh"
#include "cuda/combine.cuh"
#include "cuda/plan_part.cuh"

namespace oscar::cuda {

// What a warp has at its end: of the item of its last segment, and of an item before that which
// other warps have units of, too.
struct WarpEnd {
  ItemEnd tail;
  ItemEnd head;
};

// The items that a block's warps have units of: columns in turn to its warps, to the output where
// the block has all units, else to memory for combine_items.
template <class S>
__device__ inline void end_block(const CudaAttendCall& call, const DecodePlan& plan,
                                 const WarpEnd* ends) {
  constexpr int kWarps = S::warps(kArch);
  const int lane = fresh_lane().index;
  const int warp = fresh_warp();
  const char* shared = warp_memory<S>() - warp * S::kWarpBytes;
  const int warps = plan.block_warps;
  const int tail = lane < warps ? ends[lane].tail.item : -1;
  const int head = lane < warps ? ends[lane].head.item : -1;
  unsigned tails = __ballot_sync(kFullWarp, tail >= 0);
  unsigned heads = __ballot_sync(kFullWarp, head >= 0);
#pragma unroll 1
  for (int first = 0; (tails | heads) != 0; first += plan.slot_columns) {
    const int leader = __ffs(static_cast<int>(tails | heads)) - 1;
    ItemEnd end = (heads >> leader & 1) != 0 ? ends[leader].head : ends[leader].tail;
    const unsigned members = __ballot_sync(kFullWarp, tail == end.item);
    const unsigned holders = __ballot_sync(kFullWarp, head == end.item);
    tails &= ~members;
    heads &= ~holders;
    const ItemEnd& own =
        (holders >> lane & 1) != 0 ? ends[lane % kWarps].head : ends[lane % kWarps].tail;
    const bool has = ((members | holders) >> lane & 1) != 0;
    end.done =
        static_cast<int>(__reduce_add_sync(kFullWarp, static_cast<unsigned>(has ? own.done : 0)));
    end.slots =
        static_cast<int>(__reduce_or_sync(kFullWarp, static_cast<unsigned>(has ? own.slots : 0)));
#pragma unroll 1
    for (int column = warp >= first % warps ? warp - first % warps : warp - first % warps + warps;
         column < plan.slot_columns; column += warps) {
      RowSums<S> row = merge_column<S>(call, plan, shared, members, end, column, lane);
      finish_column<S>(call, plan, end, column, lane, row);
    }
  }
}

// The tokens of the warp's segment; of exact ones with the tiles behind them. A loop of two rounds
// and not exact tokens first, so that the code of tiles comes before theirs.
template <class S>
__device__ inline void attend_tokens(const CudaAttendCall& call, const DecodePlan& plan) {
  char* warp = warp_memory<S>();
  const WarpState<S>& state = warp_state<S>(warp);
  const DecodeSequence& s = state.item.sequence;
  bool exact;
#pragma unroll 1
  do {
    const int begin = state.begin;
    const int end = begin + state.units;
    exact = begin < s.exact_units;
    if (!exact) [[likely]] {
      const int2 tiles = tiles_of(s, state.level, begin, end);
      attend_packed_segment<S>(call, plan, tiles.x, tiles.y, warp);
    } else {
      // Without the first of the units that stand for 32 tokens: an empty result.
      const int weight = exact_weight(state.level);
      attend_exact_any<S>(call, plan, (begin + weight - 1) / weight, (end + weight - 1) / weight,
                          warp);
    }
  } while (exact && state.begin >= s.exact_units);
}

// The warp's segment, and the output of its item if that is all of it.
template <class S>
__device__ inline void attend_segment(const CudaAttendCall& call, const DecodePlan& plan,
                                      WarpEnd* ends) {
  attend_tokens<S>(call, plan);
  char* warp = warp_memory<S>();
  WarpState<S>& state = warp_state<S>(warp);
  const DecodeSequence& s = state.item.sequence;
  if (state.next == state.last) return;
  const Lane lane = fresh_lane();
  const int kind = state.begin < s.exact_units ? 1 : 2;
  __syncwarp();
  if (lane.index == 0) state.slots |= kind;
  __syncwarp();
  if (state.begin + state.units < s.item_units()) return;
  const ItemEnd whole = end_of(state);
  if (whole.done < whole.units) {
    if (lane.index == 0) ends[fresh_warp()].head = whole;
    return;
  }
#pragma unroll 1
  for (int column = 0; column < plan.slot_columns; ++column) {
    RowSums<S> row = merge_column<S>(call, plan, warp, 0, whole, column, lane.index);
    finish_column<S>(call, plan, whole, column, lane.index, row);
  }
}

// The warp's part, from the segment in its state on.
template <class S>
__device__ inline void attend_part(const CudaAttendCall& call, const DecodePlan& plan,
                                   WarpEnd* ends) {
  if (fresh_lane().index == 0) {
    WarpEnd& end = ends[fresh_warp()];
    end.tail.item = end.head.item = -1;
  }
  if (warp_state<S>(warp_memory<S>()).units == 0) return;
  do {
    attend_segment<S>(call, plan, ends);
  } while (next_segment(call, plan, fresh_lane().index, warp_state<S>(warp_memory<S>())));
  if (fresh_lane().index == 0) ends[fresh_warp()].tail = end_of(warp_state<S>(warp_memory<S>()));
}

// The block's part without a plan: out of the way of what runs with one.
static __device__ __noinline__ void find_own_part(const CudaAttendCall& call,
                                                  const DecodePlan& plan, int block,
                                                  WarpSegment& first) {
  __shared__ PlanTable table;
  prefetch_tables(call);
  find_part(call, plan, table, find_line(call, plan, table, plan.block_warps), block, fresh_warp(),
            fresh_lane().index, first);
}

template <class S>
__global__ void __launch_bounds__(32 * S::warps(kArch), 1)
    attend_decode(const __grid_constant__ CudaAttendCall call,
                  const __grid_constant__ DecodePlan plan) {
  constexpr int kWarps = S::warps(kArch);
  __shared__ WarpEnd ends[kWarps];
  WarpSegment& first = warp_state<S>(warp_memory<S>());
  const int block = static_cast<int>(blockIdx.x);
  if (call.planned != nullptr) {
    copy_part(planned_parts(call, plan, block)[fresh_warp()], fresh_lane().index, first);
  } else {
    find_own_part(call, plan, block, first);
  }
  let_kernel_behind_start();
  attend_part<S>(call, plan, ends);
  __syncthreads();
  end_block<S>(call, plan, ends);
}

}  // namespace oscar::cuda
