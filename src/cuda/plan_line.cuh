// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Where the sequences stand in the line of units (plan.cuh): every block makes the same table once,
// a lane a sequence, and its warps look their parts up. Short code matters more than few
// operations: it runs once, and its instructions come from memory as late as its data.
#pragma once

#include <cstdint>

#include "cuda/mma.cuh"
#include "cuda/plan.cuh"

namespace oscar::cuda {

// Of one sequence, or of more than kPlanRecords sequences of several together (then only where they
// start). Starts are those within the 32 records of a chunk.
struct PlanRecord {
  int unit;
  int item;
  int cached;
  int first_row;
  int queries;
  int packed_low;
  int packed_high;
  int slot;
};

inline constexpr int kPlanChunks = 8;
inline constexpr int kPlanRecords = 32 * kPlanChunks;

// Of batches of more than 32 sequences.
struct PlanTable {
  PlanRecord records[kPlanRecords];
  int2 sums[kPlanChunks];  // units and items of a chunk
};

// What a warp knows of the line: a lane a record of the chunk that matters to it.
struct LineScan {
  PlanRecord record;
  int chunk;
  int2 start;  // unit and item where the chunk starts
  int units;   // in all
  int items;
  int level;  // how fine they are
};

// Sequences of a record.
__device__ inline int record_sequences(const CudaAttendCall& call) {
  return (call.batch.size + kPlanRecords - 1) / kPlanRecords;
}

// Sums over the lanes up to this one, of the first kLanes.
template <int kLanes>
__device__ inline int2 sums_to(int2 own, int lane) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int units = __shfl_up_sync(kFullWarp, own.x, step);
    const int items = __shfl_up_sync(kFullWarp, own.y, step);
    if (lane >= step) own = make_int2(own.x + units, own.y + items);
  }
  return own;
}

// The block tables on their way to L2, a part a block: under load a warp would wait for its entry
// behind all the tiles that others have asked for.
__device__ inline void prefetch_tables(const CudaAttendCall& call) {
  const std::int64_t at = 128 * (static_cast<std::int64_t>(threadIdx.x) * gridDim.x + blockIdx.x);
  const std::int64_t bytes =
      call.batch.size * call.cache.max_pages * static_cast<std::int64_t>(sizeof(std::int32_t));
  if (at < bytes) prefetch_l2(reinterpret_cast<const std::byte*>(call.cache.block_table) + at);
}

// The finest units that leave each warp one at most, for a batch of up to 32 sequences.
__device__ inline int finest_level(const DecodePlan& plan, const DecodeSequence& s, int items) {
  int finest = kLongLevel;
#pragma unroll
  for (int level = kGroupLevel; level >= 0; --level) {
    DecodeSequence cut = s;
    cut.cut(level);
    const auto units = static_cast<unsigned>(items * cut.item_units());
    if (__reduce_add_sync(kFullWarp, units) <= static_cast<unsigned>(plan.warps())) finest = level;
  }
  return finest;
}

// Lane l: record l of `chunk`; returns the sums over the chunk.
__device__ inline int2 scan_chunk(const CudaAttendCall& call, const DecodePlan& plan, int chunk,
                                  int lane, LineScan& scan) {
  const int each = record_sequences(call);
  const int first = (32 * chunk + lane) * each;
  const int end = min(first + each, call.batch.size);
  int2 own{};
  DecodeSequence s{};
#pragma unroll 1
  for (int b = first; b < end; ++b) {
    s = decode_sequence(call, plan, b, kLongLevel);
    const int items = call.layout.kv_heads * s.blocks;
    own = make_int2(own.x + items * s.item_units(), own.y + items);
  }
  if (call.batch.size <= 32) {
    scan.level = finest_level(plan, s, own.y);
    s.cut(scan.level);
    own.x = own.y * s.item_units();
  }
  const int2 sums = sums_to<32>(own, lane);
  scan.record = {sums.x - own.x, sums.y - own.y, s.cached,      s.first_row,
                 s.queries,      s.packed_low,   s.packed_high, s.slot};
  return make_int2(__shfl_sync(kFullWarp, sums.x, 31), __shfl_sync(kFullWarp, sums.y, 31));
}

// By all threads of a block of `warps`: a batch of up to 32 sequences by every warp for itself.
__device__ inline LineScan plan_line(const CudaAttendCall& call, const DecodePlan& plan,
                                     PlanTable& table, int warps) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool alone = call.batch.size <= 32;
  LineScan scan{};
  scan.level = kLongLevel;
#pragma unroll 1
  for (int chunk = alone ? 0 : static_cast<int>(threadIdx.x) / 32; chunk < kPlanChunks;
       chunk += warps) {
    const int2 sums = scan_chunk(call, plan, chunk, lane, scan);
    scan.units = sums.x;
    scan.items = sums.y;
    if (alone) return scan;
    table.records[32 * chunk + lane] = scan.record;
    if (lane == 0) table.sums[chunk] = sums;
  }
  __syncthreads();
  const int2 own = lane < kPlanChunks ? table.sums[lane] : int2{};
  const int2 sums = sums_to<kPlanChunks>(own, lane);
  scan.start = make_int2(sums.x - own.x, sums.y - own.y);  // of chunk `lane` for now
  scan.units = __shfl_sync(kFullWarp, sums.x, kPlanChunks - 1);
  scan.items = __shfl_sync(kFullWarp, sums.y, kPlanChunks - 1);
  return scan;
}

// To the chunk that has `unit`: the last that starts at or before it, one without units starts with
// the next.
__device__ inline void find_chunk(const PlanTable& table, int unit, int lane, LineScan& scan) {
  const unsigned chunks = __ballot_sync(kFullWarp, lane < kPlanChunks && scan.start.x <= unit);
  scan.chunk = 31 - __clz(static_cast<int>(chunks));
  scan.start = make_int2(__shfl_sync(kFullWarp, scan.start.x, scan.chunk),
                         __shfl_sync(kFullWarp, scan.start.y, scan.chunk));
  scan.record = table.records[32 * scan.chunk + lane];
}

// A sequence, and its first unit and item.
struct DecodePlace {
  DecodeSequence sequence;
  int unit;
  int item;
};

__device__ inline int place_items(const CudaAttendCall& call, const DecodePlace& place) {
  return call.layout.kv_heads * place.sequence.blocks;
}
__device__ inline int place_end(const CudaAttendCall& call, const DecodePlace& place) {
  return place.unit + place_items(call, place) * place.sequence.item_units();
}
__device__ inline DecodePlace next_place(const CudaAttendCall& call, const DecodePlan& plan,
                                         const DecodePlace& place, int level) {
  return {decode_sequence(call, plan, place.sequence.b + 1, level), place_end(call, place),
          place.item + place_items(call, place)};
}

// The sequence that has `unit`, for a whole warp: the last record that starts at or before it.
__device__ inline DecodePlace find_unit(const CudaAttendCall& call, const DecodePlan& plan,
                                        const PlanTable& table, LineScan scan, int unit, int lane) {
  if (call.batch.size > 32) [[unlikely]]
    find_chunk(table, unit, lane, scan);
  const int each = record_sequences(call);
  const int first = 32 * scan.chunk;
  const unsigned records = __ballot_sync(kFullWarp, (first + lane) * each < call.batch.size &&
                                                        scan.start.x + scan.record.unit <= unit);
  const int found = 31 - __clz(static_cast<int>(records));
  const auto of_found = [&](int x) { return __shfl_sync(kFullWarp, x, found); };
  DecodePlace place{
      {}, scan.start.x + of_found(scan.record.unit), scan.start.y + of_found(scan.record.item)};
  DecodeSequence& s = place.sequence;
  s.b = (first + found) * each;
  if (each > 1) [[unlikely]] {
    s = decode_sequence(call, plan, s.b, scan.level);
    while (unit >= place_end(call, place) && s.b + 1 < call.batch.size) {
      place = next_place(call, plan, place, scan.level);
    }
    return place;
  }
  s.first_row = of_found(scan.record.first_row);
  s.queries = of_found(scan.record.queries);
  s.cached = of_found(scan.record.cached);
  s.packed_low = of_found(scan.record.packed_low);
  s.packed_high = of_found(scan.record.packed_high);
  s.slot = of_found(scan.record.slot);
  s = completed(call, plan, s, scan.level);
  return place;
}

}  // namespace oscar::cuda
