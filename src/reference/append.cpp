// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
#include <algorithm>
#include <functional>

#include "core/rows.hpp"
#include "oscar/cache.hpp"
#include "reference/pack.hpp"
#include "reference/quantize.hpp"
#include "reference/reference.hpp"
#include "reference/rotate.hpp"

namespace oscar::reference {
namespace {

// Where the tokens of one sequence of the call stand.
struct Span {
  int b;
  std::int64_t cached;     // tokens before the call
  std::int64_t first_row;  // row of token `cached` in k and v
  std::int64_t count;
  [[nodiscard]] std::int64_t end() const { return cached + count; }
};

// The row as the exact memory holds it, whether it is there already or still in the call.
void read_row(const AppendCall& call, const Span& span, Side side, int kv_head,
              std::int64_t position, float* row) {
  const Layout& layout = call.layout;
  if (position < span.cached) {
    load_row(exact_row(layout, call.cache, span.b, side, kv_head, ring_row(layout, position)),
             layout.exact_dtype, layout.head_dim, row);
    return;
  }
  const ConstRows& rows = side == Side::kKey ? call.k : call.v;
  std::byte exact[kMaxHeadDim * sizeof(float)];
  load_row(rows.row(span.first_row + position - span.cached, kv_head), rows.dtype, layout.head_dim,
           row);
  store_row(row, layout.exact_dtype, layout.head_dim, exact);
  load_row(exact, layout.exact_dtype, layout.head_dim, row);
}

void pack_tile(const AppendCall& call, const Span& span, int kv_head, std::int64_t index) {
  const Layout& layout = call.layout;
  const int head_dim = layout.head_dim;
  const float* balance = head_values(call.cache.balance, layout, kv_head);
  const float* center = head_values(call.cache.center, layout, kv_head);
  Tile tile;
  float keys[kTileTokens * kMaxHeadDim];
  float value[kMaxHeadDim];
  for (int t = 0; t < kTileTokens; ++t) {
    const std::int64_t position = index * kTileTokens + t;
    float* key = keys + t * head_dim;
    read_row(call, span, Side::kKey, kv_head, position, key);
    rotate_row(Row::kKey, head_dim, balance, key);
    if (center != nullptr) std::transform(key, key + head_dim, center, key, std::minus<>());
    read_row(call, span, Side::kValue, kv_head, position, value);
    rotate_row(Row::kValue, head_dim, balance, value);
    quantize_value(layout.tile(), t, value, tile);
  }
  const std::uint16_t* feedback =
      call.cache.feedback == nullptr
          ? nullptr
          : call.cache.feedback + static_cast<std::int64_t>(kv_head) * head_dim * head_dim;
  quantize_keys(layout.tile(), keys, tile, feedback);
  pack(layout.tile(), tile, tile_address(layout, call.cache, span.b, kv_head, index));
}

void remember(const AppendCall& call, const Span& span, Side side, int kv_head,
              std::int64_t position) {
  const Layout& layout = call.layout;
  float row[kMaxHeadDim];
  read_row(call, span, side, kv_head, position, row);
  store_row(row, layout.exact_dtype, layout.head_dim,
            exact_row(layout, call.cache, span.b, side, kv_head, ring_row(layout, position)));
  if (position >= layout.sinks) return;
  store_row(row, layout.exact_dtype, layout.head_dim,
            exact_row(layout, call.cache, span.b, side, kv_head, sink_row(layout, position)));
}

void append_head(const AppendCall& call, const Span& span, int kv_head) {
  // All tiles before any row: a new row may take the ring slot of a token that a tile still needs.
  if (call.part != AppendPart::kRemember) {
    for (std::int64_t g = span.cached / kTileTokens; g < span.end() / kTileTokens; ++g) {
      pack_tile(call, span, kv_head, g);
    }
  }
  if (call.part != AppendPart::kPack) {
    for (std::int64_t position = span.cached; position < span.end(); ++position) {
      remember(call, span, Side::kKey, kv_head, position);
      remember(call, span, Side::kValue, kv_head, position);
    }
  }
}

}  // namespace

void append(const AppendCall& call) {
  for (int b = 0; b < call.batch.size; ++b) {
    const std::int32_t first = call.batch.query_start[b];
    const Span span{b, call.cache.seq_len[b], first, call.batch.query_start[b + 1] - first};
    for (int kv_head = 0; kv_head < call.layout.kv_heads; ++kv_head) {
      append_head(call, span, kv_head);
    }
  }
}

}  // namespace oscar::reference
