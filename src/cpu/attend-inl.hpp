// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// attend: one row block of query rows over its share of packed tiles and exact tokens. The packed
// kernel is the target's choice (attend_float-inl.hpp or attend_int8-inl.hpp):
//
//   struct PackedQuery;                                            scratch of one row block
//   void prepare_packed(const TileLayout&, RowBlock&, PackedQuery&);   from block.q_rotated
//   void packed_scores(const PackedTiles&, RowBlock&, PackedQuery&);   -> block.scores
//   void add_packed_values(const PackedTiles&, RowBlock&, PackedQuery&);
//       from block.scores (minus infinity: hidden): maxima, denominators, sums of values
#pragma once

#include <omp.h>

#include "core/calls.hpp"
#include "core/plan.hpp"

namespace oscar::cpu {
namespace {

// The tokens of a row block, in units of 32: tiles, then two runs of exact tokens (sinks below the
// tiles; all tokens behind them). A row may see less: its RowView.
struct BlockRange {
  std::int64_t cached;
  std::int64_t call_row;  // row of token `cached` in k_new, v_new
  std::int64_t first_tile;
  std::int64_t end_tile;
  std::int64_t sink_first;
  std::int64_t sink_end;
  std::int64_t exact_first;
  std::int64_t exact_end;

  [[nodiscard]] std::int64_t tiles() const { return end_tile - first_tile; }
  [[nodiscard]] std::int64_t exact_tokens() const {
    return sink_end - sink_first + exact_end - exact_first;
  }
  [[nodiscard]] std::int64_t units() const {
    return tiles() + (exact_tokens() + kTileTokens - 1) / kTileTokens;
  }
};

inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// packed_tiles() of cache.hpp for every row.
inline RowView view_of(const AttendCall& call, int b, std::int64_t position) {
  const CacheView& cache = call.cache;
  const std::int64_t added = call.batch.query_start[b + 1] - call.batch.query_start[b];
  const std::int64_t in_tiles = cache.seq_len[b] + (call.options.strict ? added : 0);
  const std::int64_t exact_from = cache.exact_from == nullptr ? 0 : cache.exact_from[b];
  const std::int64_t old = larger(position + 1 - call.layout.window, 0) / kTileTokens;
  const std::int64_t lost = (exact_from + kTileTokens - 1) / kTileTokens;
  const std::int64_t window = call.options.sliding_window;
  return {position, window > 0 ? larger(position + 1 - window, 0) : 0,
          kTileTokens * smaller(in_tiles / kTileTokens, larger(old, lost))};
}

inline BlockRange range_of(const AttendCall& call, int b, const RowBlock& block) {
  const RowView& first = block.views[0];
  const RowView& last = block.views[block.rows - 1];
  BlockRange range;
  range.cached = call.cache.seq_len[b];
  range.call_row = call.batch.query_start[b];
  range.end_tile = last.packed_end / kTileTokens;
  range.first_tile = smaller(first.first / kTileTokens, range.end_tile);
  range.exact_first = larger(first.first, first.packed_end);
  range.exact_end = last.position + 1;
  range.sink_end = smaller(smaller(call.layout.sinks, first.packed_end), range.exact_end);
  range.sink_first = smaller(first.first, range.sink_end);
  return range;
}

inline float dot(const float* a, const float* b, int count) {
  Vf sum = splat(0.0f);
  for (int c = 0; c < count; c += kLanes) sum = multiply_add(load(a + c), load(b + c), sum);
  return reduce_add(sum);
}

inline void load_queries(const AttendCall& call, const AttendItem& item, RowBlock& block) {
  const AttendOptions& options = call.options;
  const int head_dim = call.layout.head_dim;
  const float scale =
      options.softcap > 0.0f ? options.scale / options.softcap : options.scale * kLog2E;
  const float* balance = head_values(call.cache.balance, item.kv_head, head_dim);
  const float* center = head_values(call.cache.center, item.kv_head, head_dim);
  for (int r = 0; r < block.rows; ++r) {
    const RowPlace place =
        place_of(call, item.b, item.kv_head, std::int64_t{item.block} * kRowBlock + r);
    const std::int64_t added = place.row - call.batch.query_start[item.b];
    block.views[r] = view_of(call, item.b, call.cache.seq_len[item.b] + added);
    load_floats(row_address(call.q, place.row, place.q_head), call.q.dtype, head_dim, block.q[r]);
    multiply(block.q[r], head_dim, scale);
    for (int c = 0; c < head_dim; c += kLanes) {
      const Vf factor =
          balance == nullptr ? load(kSigns.at + c) : load(kSigns.at + c) * load(balance + c);
      store(block.q_rotated[r] + c, load(block.q[r] + c) * factor);
    }
    hadamard_row(block.q_rotated[r], head_dim);
    block.center[r] = center == nullptr ? 0.0f : dot(block.q_rotated[r], center, head_dim);
  }
}

inline void reset(RowBlock& block) {
  for (int r = 0; r < block.rows; ++r) {
    std::memset(block.out[r], 0, sizeof block.out[r]);
    std::memset(block.out_rotated[r], 0, sizeof block.out_rotated[r]);
    std::memset(block.sum[r], 0, sizeof block.sum[r]);
    std::memset(block.offset[r], 0, sizeof block.offset[r]);
    block.max[r] = -kInfinity;
  }
}

// Tokens of tiles first_tile .. first_tile + count - 1 that row `view` does not read from the
// codes.
inline void hide_packed(const RowView& view, std::int64_t sinks, std::int64_t first_tile, int count,
                        float* scores) {
  const std::int64_t start = first_tile * kTileTokens;
  const std::int64_t first = larger(view.first, sinks) - start;
  const std::int64_t end = smaller(view.position + 1, view.packed_end) - start;
  if (first <= 0 && end >= count * kTileTokens) return;
  for (int i = 0; i < count * kTileTokens; ++i) {
    const int token = i / kTileTokens * kTileTokens + token_at(i % kTileTokens);
    if (token < first || token >= end) scores[i] = -kInfinity;
  }
}

inline void attend_tiles(const AttendCall& call, const AttendItem& item, std::int64_t first,
                         std::int64_t end, RowBlock& block, PackedQuery& query) {
  PackedTiles tiles{call.layout.tile(), 0, {}, {}};
  const auto address = [&](std::int64_t tile) {
    return tile_at(call.layout, call.cache, item.b, item.kv_head, smaller(tile, end - 1));
  };
  for (int i = 0; i < kStepTiles; ++i) tiles.next[i] = address(first + i);
  for (std::int64_t tile = first; tile < end; tile += kStepTiles) {
    tiles.count = static_cast<int>(smaller(kStepTiles, end - tile));
    for (int i = 0; i < kStepTiles; ++i) {
      tiles.at[i] = tiles.next[i];
      tiles.next[i] = address(tile + kStepTiles + i);
    }
    packed_scores(tiles, block, query);
    for (int r = 0; r < block.rows; ++r) {
      cap_scores(block, block.center[r], block.scores[r], tiles.count * kTileTokens);
      hide_packed(block.views[r], call.layout.sinks, tile, tiles.count, block.scores[r]);
    }
    add_packed_values(tiles, block, query);
  }
}

inline void add_exact_token(const AttendCall& call, const AttendItem& item, const BlockRange& range,
                            std::int64_t token, ExactBlock& exact) {
  const Layout& layout = call.layout;
  const int i = exact.count++;
  exact.tokens[i] = token;
  if (token >= range.cached) {
    const std::int64_t row = range.call_row + token - range.cached;
    exact.keys[i] = row_address(call.k_new, row, item.kv_head);
    exact.values[i] = row_address(call.v_new, row, item.kv_head);
    exact.key_dtype[i] = call.k_new.dtype;
    exact.value_dtype[i] = call.v_new.dtype;
    return;
  }
  const auto address = token < layout.sinks ? sink_address : ring_address;
  exact.keys[i] = address(layout, call.cache, item.b, Side::kKey, item.kv_head, token);
  exact.values[i] = address(layout, call.cache, item.b, Side::kValue, item.kv_head, token);
  exact.key_dtype[i] = exact.value_dtype[i] = layout.exact_dtype;
}

// Exact tokens number first .. end - 1 of the range, sinks counted first.
inline void attend_exact_tokens(const AttendCall& call, const AttendItem& item,
                                const BlockRange& range, std::int64_t first, std::int64_t end,
                                RowBlock& block) {
  const std::int64_t sinks = range.sink_end - range.sink_first;
  for (std::int64_t start = first; start < end; start += kTileTokens) {
    ExactBlock exact;
    for (std::int64_t i = start; i < smaller(start + kTileTokens, end); ++i) {
      const std::int64_t token = i < sinks ? range.sink_first + i : range.exact_first + i - sinks;
      add_exact_token(call, item, range, token, exact);
    }
    attend_exact(exact, call.layout.sinks, block);
  }
}

inline void attend_item(const AttendCall& call, const AttendPlan& plan, const AttendItem& item,
                        RowBlock& block, PackedQuery& query) {
  const TileLayout layout = call.layout.tile();
  const std::int64_t tokens = call.batch.query_start[item.b + 1] - call.batch.query_start[item.b];
  const std::int64_t all_rows = tokens * (call.q.heads / call.layout.kv_heads);
  block.rows =
      static_cast<int>(smaller(kRowBlock, all_rows - std::int64_t{item.block} * kRowBlock));
  block.head_dim = call.layout.head_dim;
  block.softcap = call.options.softcap;
  load_queries(call, item, block);
  reset(block);
  const BlockRange range = range_of(call, item.b, block);
  const std::int64_t first = range.units() * item.split / item.splits;
  const std::int64_t end = range.units() * (item.split + 1) / item.splits;
  if (first < end && first < range.tiles()) {
    prepare_packed(layout, block, query);
    attend_tiles(call, item, range.first_tile + first,
                 range.first_tile + smaller(end, range.tiles()), block, query);
    add_center(block);
    merge_rotated(layout, block);
  }
  if (end > range.tiles()) {
    attend_exact_tokens(call, item, range, kTileTokens * larger(first - range.tiles(), 0),
                        smaller(kTileTokens * (end - range.tiles()), range.exact_tokens()), block);
  }
  for (int r = 0; r < block.rows; ++r) {
    if (item.splits > 1) {
      save_partial(plan, item.slot, block, r);
      continue;
    }
    const RowPlace place =
        place_of(call, item.b, item.kv_head, std::int64_t{item.block} * kRowBlock + r);
    write_row(call, place, {block.out[r], block.max[r], reduce_add(load(block.sum[r]))});
  }
}

inline void combine_item(const AttendCall& call, const AttendPlan& plan, const AttendItem& item) {
  if (item.splits == 1 || item.split != 0) return;
  const std::int64_t tokens = call.batch.query_start[item.b + 1] - call.batch.query_start[item.b];
  const std::int64_t all_rows = tokens * (call.q.heads / call.layout.kv_heads);
  const std::int64_t rows = smaller(kRowBlock, all_rows - std::int64_t{item.block} * kRowBlock);
  for (int r = 0; r < rows; ++r) combine_row(call, plan, item, r);
}

inline void attend(const AttendCall& call) {
  const AttendPlan plan = plan_attend(call);
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  {
    RowBlock block;
    PackedQuery query;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t i = 0; i < plan.items; ++i) {
      attend_item(call, plan, plan.item(i), block, query);
    }
    if (plan.split_sequences > 0) {
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < plan.items; ++i) combine_item(call, plan, plan.item(i));
    }
  }
}

}  // namespace
}  // namespace oscar::cpu
