// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// How decode attention is cut into work for the warps of a persistent grid.
//
// An item is (sequence, KV head, block of query columns), a column being one query token of one
// query head. The tokens that an item reads are cut into units: 32 exact tokens (several units,
// since they take longer), or a group of four packed tiles; of a short batch one or two tiles,
// where that gives every warp at most one unit. All units stand in one line, sequence after
// sequence, item after item, exact before packed, and warp w of W takes the units of the w-th of W
// equal parts. Every warp finds its part from seq_len and query_start alone, so a CUDA graph may be
// replayed with other lengths.
//
// The consecutive units of one warp that belong to one kind (exact, packed) of one item are a
// segment and give one partial result. The last segment of a warp is merged with those of the other
// warps of its block (slot `merged + block + kind`), an earlier one goes to memory by itself: at
// most one warp can have it for a kind of an item (slot `kind`). Who adds the last unit to the
// item's ticket combines its parts. The order of the sums depends on the shapes only: results are
// bit-identical from run to run.
#pragma once

#include <cstdint>

#include "cuda/calls.hpp"
#include "oscar/cache.hpp"

namespace oscar::cuda {

inline constexpr int kGroupTiles = 4;

// How fine the units are: packed ones of 1, 2 or 4 tiles; on the last level 32 exact tokens stand
// for as many units as they take time, and only the first of these does them.
inline constexpr int kGroupLevel = 2;
inline constexpr int kLongLevel = 3;
__host__ __device__ constexpr int tile_shift(int level) { return level < 2 ? level : 2; }
__host__ __device__ constexpr int exact_weight(int level) { return level == kLongLevel ? 4 : 1; }
static_assert(1 << tile_shift(kGroupLevel) == kGroupTiles);
inline constexpr unsigned kFullWarp = 0xffffffffu;

// What the host knows.
struct DecodePlan {
  int group;                    // query heads of a KV head
  int columns;                  // query columns of an item
  int column_shift;             // log2 of `columns`
  int block_warps;              // of a block
  std::uint32_t block_inverse;  // ceil(2^20 / block_warps)
  int warps;                    // of the grid
  std::uint64_t inverse;        // ceil(2^40 / warps)
  int slot_columns;             // columns that an item of this call can have, at most `columns`
  int slot_floats;
  int merged;                  // first slot of the partial results that blocks merged
  std::uint32_t slots_offset;  // of the workspace, bytes
  int page_shift;              // log2 of the tiles of a page, -1 where that is not whole

  [[nodiscard]] __device__ int block_of(int warp) const {  // warp < 2^14
    return static_cast<int>(static_cast<std::uint32_t>(warp) * block_inverse >> 20);
  }
};

// Where a sequence's units and kinds start in the line.
struct DecodeStart {
  int unit;
  int kind;
};

// The workspace: a ticket an item (units that are done, 0 at first), then the slots.
__host__ __device__ constexpr std::int64_t ticket_bytes(std::int64_t kinds) {
  return (kinds / 2 * static_cast<std::int64_t>(sizeof(int)) + 255) / 256 * 256;
}
__device__ inline int* ticket_of(const CudaAttendCall& call, int kind) {
  return reinterpret_cast<int*>(call.workspace) + kind / 2;
}
__device__ inline float* slots_of(const CudaAttendCall& call, const DecodePlan& plan) {
  return reinterpret_cast<float*>(call.workspace + plan.slots_offset);
}

// One sequence. Tokens below `sinks` and from exact_first on are exact, the tiles from first_tile
// to packed_high - 1 packed; a query of its own sees a part of that (docs/format.md).
struct DecodeSequence {
  int b;
  int first_row;
  int queries;      // 0 where the sequence is not of the decode path
  int cached;       // tokens before the call
  int slot;         // of its exact memory
  int packed_low;   // tiles that the first query reads packed
  int packed_high;  // tiles that the last query reads packed
  int first_tile;   // the first one in any query's window
  int sinks;
  int exact_first;
  int exact_tokens;
  int exact_units;
  int packed_units;
  int blocks;  // of query columns, a KV head

  [[nodiscard]] __device__ int item_units() const { return exact_units + packed_units; }
  [[nodiscard]] __device__ int exact_units_on(int level) const {
    return (exact_tokens + kTileTokens - 1) / kTileTokens * exact_weight(level);
  }
  [[nodiscard]] __device__ int packed_units_on(int level) const {
    const int shift = tile_shift(level);
    if (packed_high <= first_tile) return 0;
    return ((packed_high - 1) >> shift) - (first_tile >> shift) + 1;
  }
};

// Leading tiles that the query at `position` reads packed, as far as the block table reaches.
__device__ inline int decode_packed_tiles(const CudaAttendCall& call, const DecodeSequence& s,
                                          int position) {
  const int from = call.cache.exact_from == nullptr ? 0 : call.cache.exact_from[s.b];
  const int in_tiles = s.cached + (call.options.strict ? s.queries : 0);
  const int old = max(position + 1 - call.layout.window, 0) / kTileTokens;
  const int lost = (max(from, 0) + kTileTokens - 1) / kTileTokens;
  const std::int64_t table =
      call.cache.num_pages > 0 ? call.cache.max_pages * call.layout.tiles_per_page() : 0;
  return static_cast<int>(
      min(static_cast<std::int64_t>(min(in_tiles / kTileTokens, max(old, lost))), table));
}

// The first token that the query at `position` sees.
__device__ inline int first_token(const CudaAttendCall& call, int position) {
  const int window = call.options.sliding_window;
  return window > 0 ? max(position - window + 1, 0) : 0;
}

__device__ inline DecodeSequence decode_sequence(const CudaAttendCall& call, const DecodePlan& plan,
                                                 int b, int level) {
  DecodeSequence s{};
  s.b = b;
  const int last_row = min(call.batch.query_start[b + 1], static_cast<int>(call.q.tokens));
  s.first_row = max(call.batch.query_start[b], 0);
  s.cached = max(call.cache.seq_len[b], 0);
  s.slot = call.cache.slot[b];
  const int queries = last_row - s.first_row;
  if (queries <= 0 || queries > kMaxDecodeQueries) return s;
  s.queries = queries;
  s.packed_low = decode_packed_tiles(call, s, s.cached);
  s.packed_high = decode_packed_tiles(call, s, s.cached + queries - 1);
  const int low = first_token(call, s.cached);
  s.first_tile = low / kTileTokens;
  s.sinks = s.packed_low > 0 && low < call.layout.sinks ? call.layout.sinks : 0;
  s.exact_first = max(kTileTokens * s.packed_low, low);
  s.exact_tokens = s.sinks + s.cached + queries - s.exact_first;
  s.exact_units = s.exact_units_on(level);
  s.packed_units = s.packed_units_on(level);
  s.blocks = (queries * plan.group + plan.columns - 1) >> plan.column_shift;
  return s;
}

// The equal parts of the line: warp w has the units from floor(w units / warps) on; of fewer units
// than warps one each.
struct DecodeLine {
  int units;
  int each;  // units / warps
  int rest;  // units % warps
  int warps;
  std::uint64_t inverse;  // ceil(2^40 / warps); exact for what is divided here, less than warps^2
  int level;              // how fine the units are

  [[nodiscard]] __device__ int start(int w) const {
    if (units < warps) return min(w, units);
    return w * each + static_cast<int>(static_cast<std::uint32_t>(w * rest) * inverse >> 40);
  }
  // The last warp that starts at or before `unit`.
  [[nodiscard]] __device__ int owner(int unit) const {
    if (units < warps) return unit;
    const float guess =
        static_cast<float>(unit + 1) * static_cast<float>(warps) / static_cast<float>(units);
    int w = min(static_cast<int>(guess), warps - 1);
    while (w > 0 && start(w) > unit) --w;
    while (w < warps - 1 && start(w + 1) <= unit) ++w;
    return w;
  }
};
__device__ inline DecodeLine decode_line(const DecodePlan& plan, int units, int level) {
  const int each = units / plan.warps;
  return {units, each, units - each * plan.warps, plan.warps, plan.inverse, level};
}

// Sums over the 32 sequences from b0 on, and the sums before each of them, a lane a sequence.
struct DecodeSums {
  int units;
  int kinds;
};
__device__ inline DecodeSums sums_before(DecodeSums own, int lane, DecodeSums& before) {
  DecodeSums sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int units = __shfl_up_sync(kFullWarp, sum.units, step);
    const int kinds = __shfl_up_sync(kFullWarp, sum.kinds, step);
    if (lane >= step) sum = {sum.units + units, sum.kinds + kinds};
  }
  before = {sum.units - own.units, sum.kinds - own.kinds};
  return {__shfl_sync(kFullWarp, sum.units, 31), __shfl_sync(kFullWarp, sum.kinds, 31)};
}
__device__ inline DecodeSums add_sequences(const CudaAttendCall& call, const DecodePlan& plan,
                                           int b0, int lane, DecodeSums& before) {
  DecodeSums own{0, 0};
  if (b0 + lane < call.batch.size) {
    const DecodeSequence s = decode_sequence(call, plan, b0 + lane, kLongLevel);
    const int items = call.layout.kv_heads * s.blocks;
    own = {items * s.item_units(), 2 * items};
  }
  return sums_before(own, lane, before);
}

// Sums over 32 sequences each, shared by the warps of a block.
inline constexpr int kMaxSharedChunks = 256;

// Total units, and where a batch of up to 32 sequences stands in one scan, a lane a sequence.
struct DecodeScan {
  int units;
  int level;  // how fine the units are
  bool alone;
  DecodeSums before;
};

// A batch of up to 32 sequences: the finest units that leave each warp one at most.
__device__ inline DecodeScan scan_alone(const CudaAttendCall& call, const DecodePlan& plan,
                                        int lane) {
  DecodeScan scan{0, kLongLevel, true, {0, 0}};
  DecodeSequence s{};
  if (lane < call.batch.size) s = decode_sequence(call, plan, lane, kLongLevel);
  const int items = call.layout.kv_heads * s.blocks;
#pragma unroll
  for (int level = kGroupLevel; level >= 0; --level) {
    const auto units =
        static_cast<unsigned>(items * (s.exact_units_on(level) + s.packed_units_on(level)));
    if (__reduce_add_sync(kFullWarp, units) <= static_cast<unsigned>(plan.warps)) {
      scan.level = level;
    }
  }
  const DecodeSums own{items * (s.exact_units_on(scan.level) + s.packed_units_on(scan.level)),
                       2 * items};
  scan.units = sums_before(own, lane, scan.before).units;
  return scan;
}

// By all threads of a block; of more than 32 sequences each warp scans a part for all.
__device__ inline DecodeScan plan_line(const CudaAttendCall& call, const DecodePlan& plan,
                                       DecodeSums* chunks) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int count = (call.batch.size + 31) / 32;
  if (count == 1) return scan_alone(call, plan, lane);
  DecodeScan scan{0, kLongLevel, false, {0, 0}};
  if (count <= kMaxSharedChunks) {
#pragma unroll 1
    for (int i = warp; i < count; i += plan.block_warps) {
      const DecodeSums sums = add_sequences(call, plan, 32 * i, lane, scan.before);
      if (lane == 0) chunks[i] = sums;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count; ++i) scan.units += chunks[i].units;
    return scan;
  }
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    scan.units += add_sequences(call, plan, 32 * i, lane, scan.before).units;
  }
  return scan;
}

// The sequence that has `unit`, for a whole warp.
struct DecodePlace {
  int b;
  DecodeStart start;
};

// Of the 32 sequences from b0 on, the last that starts at or before the unit: one without units
// starts with the next.
__device__ inline DecodePlace place_in_chunk(int b0, const DecodeStart& start,
                                             const DecodeSums& before, int unit) {
  const unsigned starts = __ballot_sync(kFullWarp, start.unit + before.units <= unit);
  const int from = 31 - __clz(static_cast<int>(starts));
  return {b0 + from,
          {start.unit + __shfl_sync(kFullWarp, before.units, from),
           start.kind + __shfl_sync(kFullWarp, before.kinds, from)}};
}

__device__ inline DecodePlace find_unit(const CudaAttendCall& call, const DecodePlan& plan,
                                        const DecodeSums* chunks, const DecodeScan& scan, int unit,
                                        int lane) {
  if (scan.alone) return place_in_chunk(0, {0, 0}, scan.before, unit);
  const int count = (call.batch.size + 31) / 32;
  const bool shared = count <= kMaxSharedChunks;
  DecodeStart start{0, 0};
  int i = 0;
#pragma unroll 1
  for (; shared && i < count && start.unit + chunks[i].units <= unit; ++i) {
    start = {start.unit + chunks[i].units, start.kind + chunks[i].kinds};
  }
#pragma unroll 1
  for (; i < count; ++i) {
    DecodeSums before;
    const DecodeSums sums = add_sequences(call, plan, 32 * i, lane, before);
    if (start.unit + sums.units > unit) return place_in_chunk(32 * i, start, before, unit);
    start = {start.unit + sums.units, start.kind + sums.kinds};
  }
  return {call.batch.size, start};
}

}  // namespace oscar::cuda
