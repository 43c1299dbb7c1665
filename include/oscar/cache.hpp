// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The cache as a view of the caller's arrays, and the rule that says which copy of a token a query
// reads. The library owns no memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "oscar/format.hpp"
#include "oscar/tensor.hpp"

namespace oscar {

// What is fixed for the life of a cache.
struct Layout {
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  Format format = kK2V2;
  std::int32_t page_tokens = 128;    // multiple of 32
  std::int32_t window = 32;          // newest tokens read exactly, on top of the open tile
  std::int32_t sinks = 4;            // first tokens of a sequence, always read exactly; 0..32
  DType exact_dtype = DType::kBF16;  // of the ring and the sinks
  // Blocks that hold the exact copies of a sequence, for engines whose memory comes in blocks: 1;
  // 2: K, V; 4: the first and the second half of K's ring and sinks, then V's (ExactPlace below).
  std::int32_t exact_blocks = 1;

  [[nodiscard]] constexpr TileLayout tile() const { return {head_dim, format}; }
  [[nodiscard]] constexpr std::int32_t tiles_per_page() const { return page_tokens / kTileTokens; }
  // Slots of the ring: enough for the open tile and `window` tokens before it, and enough to crop
  // `window` tokens and still hold the tile that becomes open.
  [[nodiscard]] constexpr std::int32_t ring_tokens() const {
    return (window + kTileTokens - 1 + kTileTokens - 1) / kTileTokens * kTileTokens;
  }
  [[nodiscard]] constexpr std::int64_t exact_rows() const { return ring_tokens() + sinks; }
  // Rows of one KV head, and of one of K and V, in a block.
  [[nodiscard]] constexpr std::int64_t exact_block_rows() const {
    return exact_blocks == 4 ? exact_rows() / 2 : exact_rows();
  }
  [[nodiscard]] constexpr std::int64_t exact_block_bytes() const {
    return (exact_blocks == 1 ? 2 : 1) * kv_heads * exact_block_rows() * head_dim *
           static_cast<std::int64_t>(size_of(exact_dtype));
  }
  [[nodiscard]] constexpr std::int64_t page_bytes() const {
    return static_cast<std::int64_t>(kv_heads) * tiles_per_page() * tile().tile_bytes();
  }
};

// Arrays of one layer. Alignment: pages 32 bytes, others natural.
struct CacheView {
  std::uint8_t* pages = nullptr;  // [num_pages, kv_heads, page_tokens / 32, tile_bytes]
  std::int64_t num_pages = 0;
  const std::int32_t* block_table =
      nullptr;  // [batch, max_pages], page of tokens 128 i .. 128 i + 127
  std::int64_t max_pages = 0;
  void* exact =
      nullptr;  // [slots, 2 (K, V), kv_heads, ring_tokens + sinks, head_dim], exact_dtype;
                // of 2 or 4 exact_blocks: [slots, kv_heads, exact_block_rows, head_dim]
  std::int64_t slots = 0;
  std::int64_t exact_stride = 0;       // bytes between two slots of `exact`; 0: no gaps
  const std::int32_t* slot = nullptr;  // [batch, exact_blocks], where in `exact` each sequence is
  const std::int32_t* seq_len = nullptr;  // [batch], tokens before this call
  const std::int32_t* exact_from =
      nullptr;  // [batch] or null (= 0): no ring copy of earlier tokens
  const float* balance =
      nullptr;  // [kv_heads, head_dim] or null (= 1), 1/64 to 64: K / balance, Q * balance
  // [kv_heads, head_dim] or null (= 0): the constant part of a head's keys in the rotated basis,
  // rotate(K / balance). Tiles hold what is left of a key without it, and attend adds query .
  // center, in the rotated basis, to the scores of packed tokens. At most kMaxInput in magnitude;
  // 16-byte aligned on a CUDA device.
  const float* center = nullptr;
  // [kv_heads, head_dim, head_dim] fp16, finite, or null (= 0). Only append reads it: the rounding
  // error e of rotated K channel c is carried on, z[c'] - e feedback[c][c'] for every c' > c
  // (docs/format.md, feedback). 16-byte aligned on a CUDA device.
  const std::uint16_t* feedback = nullptr;
};

// A ragged batch: tokens query_start[b] .. query_start[b + 1] - 1 of the row arrays belong to
// sequence b, at positions seq_len[b], seq_len[b] + 1, ...
struct Batch {
  std::int32_t size = 0;
  const std::int32_t* query_start = nullptr;  // [size + 1], query_start[0] == 0
};

// Row of the ring that holds token `position`.
constexpr std::int32_t ring_row(const Layout& layout, std::int64_t position) {
  return static_cast<std::int32_t>(position % layout.ring_tokens());
}
// Row of the exact memory that holds sink `position`.
constexpr std::int32_t sink_row(const Layout& layout, std::int64_t position) {
  return layout.ring_tokens() + static_cast<std::int32_t>(position);
}

// Where row `row` (ring_row or sink_row) of K (side 0) or V (side 1) lies: in which of a sequence's
// blocks, and there at which [plane, kv_head, row].
struct ExactPlace {
  std::int32_t block;
  std::int32_t plane;
  std::int32_t row;
};
constexpr ExactPlace exact_place(const Layout& layout, std::int32_t side, std::int32_t row) {
  if (layout.exact_blocks == 1) return {0, side, row};
  if (layout.exact_blocks == 2) return {side, 0, row};
  const std::int32_t ring_half = layout.ring_tokens() / 2;
  const std::int32_t sink_half = layout.sinks / 2;
  if (row < ring_half) return {2 * side, 0, row};
  if (row < 2 * ring_half) return {2 * side + 1, 0, row - ring_half};
  if (row < 2 * ring_half + sink_half) return {2 * side, 0, row - ring_half};
  return {2 * side + 1, 0, row - ring_half - sink_half};
}

// Number of leading tiles that the query at `position` reads packed (docs/format.md, position
// rule): tile g if 32 (g + 1) <= position + 1 - window, or if its tokens have no exact copy;
// never more than the `packed_tokens / 32` complete tiles.
constexpr std::int64_t packed_tiles(const Layout& layout, std::int64_t position,
                                    std::int64_t packed_tokens, std::int64_t exact_from) {
  const std::int64_t old = std::max<std::int64_t>(position + 1 - layout.window, 0) / kTileTokens;
  const std::int64_t lost = (exact_from + kTileTokens - 1) / kTileTokens;
  return std::min(packed_tokens / kTileTokens, std::max(old, lost));
}

}  // namespace oscar
