// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// How decode attention is cut into work for the warps of a persistent grid.
//
// An item is (sequence, KV head, block of query columns), a column being one query token of one
// query head. The tokens that an item reads are cut into units: 32 exact tokens (several units,
// since they take longer), or a group of four packed tiles; of a short batch one or two tiles,
// where that gives every warp at most one unit. All units stand in one line, sequence after
// sequence, item after item, exact before packed, and the blocks take equal parts of it, as their
// warps do of a block's. Every block makes the plan from seq_len and query_start alone
// (plan_line.cuh), or a kernel has made it for all calls of a step (plan_part.cuh): a CUDA graph
// may be replayed with other lengths.
//
// The consecutive units of one warp that belong to one kind (exact, packed) of one item are a
// segment and give one partial result: the last one of a warp in its shared memory, an earlier one
// in memory, where at most one warp can have it for a kind of an item (slot `kind`). At its end a
// block merges what it has of each item. Where that is not all, it goes to memory (slot `merged +
// block + item`), and a second kernel combines the parts (attend_combine.cuh).
// The order of the sums depends on the shapes only: results are bit-identical from run to run.
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

// Where rows of the exact memory are (oscar::exact_place, for any number of blocks): ring and sinks
// lie in one part, or half of each in one of two.
struct DecodeExact {
  int ring;                    // rows of the ring
  std::uint32_t ring_inverse;  // floor(2^32 / ring)
  int ring_part;               // rows of the ring in a part
  int sink_part;
  int head_rows;  // rows of a KV head in a block
  int row_bytes;
  int value_block;             // block of V's first part, 0 if K's has V, too
  std::uint32_t value_offset;  // bytes from a row of K to that of V in the same block
  std::int64_t stride;         // bytes from one slot to the next

  [[nodiscard]] __device__ int ring_row(int token) const {
    const auto at = static_cast<std::uint32_t>(token);
    const std::uint32_t rest = at - __umulhi(at, ring_inverse) * static_cast<unsigned>(ring);
    return static_cast<int>(min(rest, rest - static_cast<unsigned>(ring)));
  }
};

// What the host knows.
struct DecodePlan {
  int group;                    // query heads of a KV head
  std::uint32_t group_inverse;  // ceil(2^16 / group)
  int columns;                  // query columns of an item
  int column_shift;             // log2 of `columns`
  int block_warps;              // of a block
  int blocks;                   // of the grid
  int slot_columns;             // columns that an item of this call can have, at most `columns`
  int slot_floats;
  int merged;                  // first slot of the partial results that blocks merged
  std::uint32_t page_inverse;  // ceil(2^32 / tiles of a page), 0 where that is 1
  int table_tiles;             // tiles that the block table of a sequence reaches
  DecodeExact exact;

  [[nodiscard]] __device__ int warps() const { return blocks * block_warps; }
  [[nodiscard]] __device__ int page_of(int tile) const {  // below 2^32 / tiles of a page
    return page_inverse == 0
               ? tile
               : static_cast<int>(__umulhi(static_cast<unsigned>(tile), page_inverse));
  }
  [[nodiscard]] __device__ int query_of(int column) const {  // column < 2^8
    return static_cast<int>(static_cast<std::uint32_t>(column) * group_inverse >> 16);
  }
};

// a / b of 0 <= a < 2^31 and b > 0 where the quotient is below 2^20: one correction mends what the
// approximate reciprocal may be off.
__device__ inline int divide(int a, int b) {
  const int guess = __float2int_rz(__fdividef(static_cast<float>(a), static_cast<float>(b)));
  const int rest = a - guess * b;
  return guess + (rest >= b ? 1 : 0) - (rest < 0 ? 1 : 0);
}

// One sequence. Tokens below `sinks` and from exact_first on are exact, the tiles from first_tile
// to packed_high - 1 packed; a query of its own sees a part of that (docs/format.md).
struct DecodeSequence {
  int b;
  int first_row;
  int queries;      // 0 where the sequence is not of the decode path
  int cached;       // tokens before the call
  int slot;         // of its exact memory, the first if there are several
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
  __device__ void cut(int level) {
    const int shift = tile_shift(level);
    exact_units = (exact_tokens + kTileTokens - 1) / kTileTokens * exact_weight(level);
    packed_units =
        packed_high <= first_tile ? 0 : ((packed_high - 1) >> shift) - (first_tile >> shift) + 1;
  }
};

// Leading tiles that the query at `position` reads packed, as far as the block table reaches.
__device__ inline int decode_packed_tiles(const CudaAttendCall& call, const DecodePlan& plan,
                                          const DecodeSequence& s, int position) {
  const int from = call.cache.exact_from == nullptr ? 0 : call.cache.exact_from[s.b];
  const int in_tiles = s.cached + (call.options.strict ? s.queries : 0);
  const int old = max(position + 1 - call.layout.window, 0) / kTileTokens;
  const int lost = (max(from, 0) + kTileTokens - 1) / kTileTokens;
  return min(min(in_tiles / kTileTokens, max(old, lost)), plan.table_tiles);
}

// The same of query `query` of the sequence, without a load for its first.
__device__ inline int packed_tiles_of(const CudaAttendCall& call, const DecodePlan& plan,
                                      const DecodeSequence& s, int query) {
  return query == 0 ? s.packed_low : decode_packed_tiles(call, plan, s, s.cached + query);
}

// The first token that the query at `position` sees.
__device__ inline int first_token(const CudaAttendCall& call, int position) {
  const int window = call.options.sliding_window;
  return window > 0 ? max(position - window + 1, 0) : 0;
}

// What follows from b, first_row, queries, cached, packed_low and packed_high.
__device__ inline DecodeSequence completed(const CudaAttendCall& call, const DecodePlan& plan,
                                           DecodeSequence s, int level) {
  if (s.queries == 0) return s;
  const int low = first_token(call, s.cached);
  s.first_tile = low / kTileTokens;
  s.sinks = s.packed_low > 0 && low < call.layout.sinks ? call.layout.sinks : 0;
  s.exact_first = max(kTileTokens * s.packed_low, low);
  s.exact_tokens = s.sinks + s.cached + s.queries - s.exact_first;
  s.blocks = (s.queries * plan.group + plan.columns - 1) >> plan.column_shift;
  s.cut(level);
  return s;
}

__device__ inline DecodeSequence decode_sequence(const CudaAttendCall& call, const DecodePlan& plan,
                                                 int b, int level) {
  DecodeSequence s{};
  s.b = b;
  const int last_row = min(call.batch.query_start[b + 1], static_cast<int>(call.q.tokens));
  s.first_row = max(call.batch.query_start[b], 0);
  s.cached = max(call.cache.seq_len[b], 0);
  s.slot = call.cache.slot[b * call.layout.exact_blocks];
  const int queries = last_row - s.first_row;
  if (queries <= 0 || queries > kMaxDecodeQueries) return s;
  s.queries = queries;
  s.packed_low = decode_packed_tiles(call, plan, s, s.cached);
  s.packed_high = decode_packed_tiles(call, plan, s, s.cached + queries - 1);
  return completed(call, plan, s, level);
}

// The equal parts of the line: block b of `blocks` has the units from floor(b units / blocks) on,
// at least one, and its warps equal parts of those.
struct DecodeLine {
  int units;
  int blocks;
  int each;   // units / blocks
  int rest;   // units % blocks
  int level;  // how fine the units are

  [[nodiscard]] __device__ int block_start(int b) const {
    return b * each + divide(b * rest, blocks);
  }
  // Of warp `warp` of `warps` of block b.
  [[nodiscard]] __device__ int2 part(int b, int warp, int warps) const {
    if (b >= blocks) return make_int2(0, 0);
    const int first = block_start(b);
    const int count = block_start(b + 1) - first;
    return make_int2(first + divide(warp * count, warps),
                     first + divide((warp + 1) * count, warps));
  }
  // The block that has `unit`.
  [[nodiscard]] __device__ int owner(int unit) const {
    const float guess = __fdividef((static_cast<float>(unit) + 0.5f) * static_cast<float>(blocks),
                                   static_cast<float>(units));
    int b = min(static_cast<int>(guess), blocks - 1);
    while (b > 0 && block_start(b) > unit) --b;
    while (b < blocks - 1 && block_start(b + 1) <= unit) ++b;
    return b;
  }
};

// Units that a warp has at most.
__device__ inline int most_units(const DecodePlan& plan, int units, int blocks) {
  return divide(divide(units + blocks - 1, blocks) + plan.block_warps - 1, plan.block_warps);
}

// Of equal items, as many blocks as give each block whole items, or each item whole blocks, if that
// takes no longer than all blocks: what blocks share costs a merge through memory, and an item that
// ends within a warp's part a new start. Where a warp has one unit, as few blocks as that takes:
// less is shared, and fewer multiprocessors read the code.
__device__ inline DecodeLine decode_line(const DecodePlan& plan, int units, int items, int level) {
  int blocks = max(min(plan.blocks, units), 1);  // none without units between two that have some
  if (items > 0 && units == divide(units, items) * items) {
    const int most = most_units(plan, units, blocks);
    const int per_block = divide(items + blocks - 1, blocks);
    const int even =
        items <= blocks ? divide(blocks, items) * items : divide(items + per_block - 1, per_block);
    const int few = items * divide(divide(units, items) + plan.block_warps - 1, plan.block_warps);
    if (most_units(plan, units, even) <= most) blocks = even;
    if (most == 1 && few <= blocks) blocks = few;
  }
  const int each = divide(units, blocks);
  return {units, blocks, each, units - each * blocks, level};
}

}  // namespace oscar::cuda
