// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// What each warp and each block does of the line of units (plan_line.cuh): the first segment of a
// warp's part, and the item that a block of the second kernel combines. All layers of a step may
// share it: plan_attend writes it to memory once (attend_plan.cu), 128 bytes a warp.
#pragma once

#include <cstdint>

#include "cuda/plan_line.cuh"

namespace oscar::cuda {

struct DecodeItem {
  DecodeSequence sequence;
  int kv_head;
  int first_column;
};

// One warp's segment: packed tiles or exact tokens of one item.
struct WarpSegment {
  DecodeItem item;
  int item_index;
  int begin;       // of the item's units
  int units;       // 0: the warp has nothing to do
  int done;        // units of the item that this warp did
  int slots;       // and the results of them that are in memory: 1 exact, 2 packed
  int next;        // unit of the line after this segment
  int last;        // of the warp's part
  int first_unit;  // of the sequence
  int first_item;
  int level;  // of the line
};

// What a warp, or all warps of a block, did of an item, and what the item is.
struct ItemEnd {
  int item;   // -1: nothing
  int done;   // units
  int slots;  // results in memory beside those in shared memory: 1 exact, 2 packed
  int units;  // of the item
  int first_unit;
  int first_row;
  int queries;
  int kv_head;
  int first_column;
};

__device__ inline ItemEnd end_of(const WarpSegment& segment) {
  const DecodeSequence& s = segment.item.sequence;
  return {segment.item_index,
          segment.done,
          segment.slots,
          s.item_units(),
          segment.next - segment.units - segment.begin,
          s.first_row,
          s.queries,
          segment.item.kv_head,
          segment.item.first_column};
}

// The next segment of the sequence at `unit`, after the one in `to`.
__device__ inline void set_segment(const DecodePlan& plan, const DecodePlace& place, int unit,
                                   int last, WarpSegment& to) {
  const DecodeSequence& s = place.sequence;
  const int per_item = s.item_units();
  const int at = unit - place.unit;
  const int item = divide(at, per_item);
  const int begin = at - item * per_item;
  const int units = min(last - unit, (begin < s.exact_units ? s.exact_units : per_item) - begin);
  const int kv_head = s.blocks == 1 ? item : divide(item, s.blocks);
  to.item = {s, kv_head, (item - kv_head * s.blocks) * plan.columns};
  const bool goes_on = begin > 0 && to.item_index == place.item + item;
  to.done = goes_on ? to.done + units : units;
  to.slots = goes_on ? to.slots : 0;
  to.item_index = place.item + item;
  to.begin = begin;
  to.units = units;
  to.next = unit + units;
  to.last = last;
  to.first_unit = place.unit;
  to.first_item = place.item;
}

// The segment behind the one in `to`; false: that was the last of the part. Few warps have one.
static __device__ __noinline__ bool next_segment(const CudaAttendCall& call, const DecodePlan& plan,
                                                 int lane, WarpSegment& to) {
  const int unit = to.next;
  const int last = to.last;
  if (unit >= last) return false;
  DecodePlace place{to.item.sequence, to.first_unit, to.first_item};
#pragma unroll 1
  while (unit >= place_end(call, place)) {
    if (place.sequence.b + 1 >= call.batch.size) return false;
    place = next_place(call, plan, place, to.level);
  }
  __syncwarp();
  if (lane == 0) set_segment(plan, place, unit, last, to);
  __syncwarp();
  return true;
}

// The line and its parts.
struct PlannedLine {
  LineScan scan;
  DecodeLine line;
};
// By all threads of a block of `warps`.
__device__ inline PlannedLine find_line(const CudaAttendCall& call, const DecodePlan& plan,
                                        PlanTable& table, int warps) {
  const LineScan scan = plan_line(call, plan, table, warps);
  return {scan, decode_line(plan, scan.units, scan.items, scan.level)};
}

// The first segment of warp `warp` of block `block`, by that warp.
__device__ inline void find_part(const CudaAttendCall& call, const DecodePlan& plan,
                                 const PlanTable& table, const PlannedLine& planned, int block,
                                 int warp, int lane, WarpSegment& to) {
  const int2 part = planned.line.part(block, warp, plan.block_warps);
  if (part.x < part.y) {
    const DecodePlace place = find_unit(call, plan, table, planned.scan, part.x, lane);
    if (lane == 0) {
      to.item_index = -1;
      to.level = planned.line.level;
      set_segment(plan, place, part.x, part.y, to);
    }
  } else if (lane == 0) {
    to.units = 0;
  }
  __syncwarp();
}

// An item that several blocks have units of: from the one that combines it to last_block.
struct SplitItem {
  ItemEnd end;  // item -1: none
  int last_block;
};

// The item whose first units block `block` has and whose last ones another, by a warp.
__device__ inline SplitItem find_split_item(const CudaAttendCall& call, const DecodePlan& plan,
                                            const PlanTable& table, const PlannedLine& planned,
                                            int block, int lane) {
  const DecodeLine& line = planned.line;
  SplitItem split{};
  split.end.item = -1;
  if (block >= line.blocks - 1) return split;
  const int behind = line.block_start(block + 1);
  const DecodePlace place = find_unit(call, plan, table, planned.scan, behind - 1, lane);
  const DecodeSequence& s = place.sequence;
  const int units = s.item_units();
  const int item = divide(behind - 1 - place.unit, units);
  const int first = place.unit + item * units;
  if (first < line.block_start(block) || first + units <= behind) return split;
  const int kv_head = divide(item, s.blocks);
  const int column = (item - kv_head * s.blocks) * plan.columns;
  split.end = {place.item + item, 0, 0, units, first, s.first_row, s.queries, kv_head, column};
  split.last_block = line.owner(first + units - 1);
  return split;
}

// In memory: [block][warp] parts, [block] split items.
struct alignas(kPlannedPartBytes) PlannedPart {
  WarpSegment first;
};
struct alignas(kPlannedItemBytes) PlannedItem {
  SplitItem split;
};
static_assert(sizeof(PlannedPart) == kPlannedPartBytes && sizeof(PlannedItem) == kPlannedItemBytes);
__device__ inline PlannedPart* planned_parts(const CudaAttendCall& call, const DecodePlan& plan,
                                             int block) {
  return reinterpret_cast<PlannedPart*>(call.planned) + block * plan.block_warps;
}
__device__ inline PlannedItem* planned_items(const CudaAttendCall& call, const DecodePlan& plan) {
  return reinterpret_cast<PlannedItem*>(planned_parts(call, plan, plan.blocks));
}

// Writes them (attend_plan.cu).
void launch_plan_kernel(const CudaAttendCall& call, const DecodePlan& plan, cudaStream_t stream);

// By a warp, to shared memory.
__device__ inline void copy_part(const PlannedPart& from, int lane, WarpSegment& to) {
  constexpr int kWords = sizeof(WarpSegment) / 4;
  static_assert(kWords <= 32);
  if (lane < kWords) {
    reinterpret_cast<int*>(&to)[lane] = __ldcg(reinterpret_cast<const int*>(&from.first) + lane);
  }
  __syncwarp();
}

}  // namespace oscar::cuda
