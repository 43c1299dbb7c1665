// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// append: tiles in parallel over (sequence, KV head, tile), then the exact rows over (sequence, KV
// head). All tiles before any row: a new row may take the ring slot of a token a tile still needs.
#pragma once

#include <omp.h>

#include "core/calls.hpp"

namespace oscar::cpu {
namespace {

// One sequence of the call.
struct AppendSpan {
  int b;
  std::int64_t cached;     // tokens before the call
  std::int64_t first_row;  // row of token `cached` in k and v
  std::int64_t end;        // cached + tokens of the call

  [[nodiscard]] std::int64_t first_tile() const { return cached / kTileTokens; }
  [[nodiscard]] std::int64_t tiles() const { return end / kTileTokens - first_tile(); }
};

inline AppendSpan append_span(const AppendCall& call, int b) {
  const std::int64_t cached = call.cache.seq_len[b];
  const std::int64_t first_row = call.batch.query_start[b];
  return {b, cached, first_row, cached + call.batch.query_start[b + 1] - first_row};
}

// 32 rows in position order, as the exact memory holds or will hold them.
inline void load_tile_rows(const AppendCall& call, const AppendSpan& span, int side, int kv_head,
                           std::int64_t tile, float* rows) {
  const Layout& layout = call.layout;
  const ConstRows& source = side == Side::kKey ? call.k : call.v;
  for (int p = 0; p < kTileTokens; ++p) {
    float* row = rows + p * kMaxHeadDim;
    const std::int64_t token = tile * kTileTokens + token_at(p);
    if (token < span.cached) {
      load_floats(ring_address(layout, call.cache, span.b, side, kv_head, token),
                  layout.exact_dtype, layout.head_dim, row);
      continue;
    }
    load_floats(row_address(source, span.first_row + token - span.cached, kv_head), source.dtype,
                layout.head_dim, row);
    if (source.dtype == layout.exact_dtype || layout.exact_dtype == DType::kF32) continue;
    std::byte exact[2 * kMaxHeadDim];
    store_floats(row, layout.exact_dtype, layout.head_dim, exact);
    load_floats(exact, layout.exact_dtype, layout.head_dim, row);
  }
}

// Reads a word of each cache line of the share of `kv_head` in the rows of the next tile: the
// hardware fetches what is read in order, while prefetch instructions did nothing for rows that
// come from memory (20 % of a long prompt's packing).
inline void read_ahead(const AppendCall& call, const AppendSpan& span, const ConstRows& source,
                       int kv_head, std::int64_t tile) {
  constexpr std::int64_t kLine = 64;
  const std::int64_t first = (tile + 1) * kTileTokens - span.cached;
  if (first < 0 || first + kTileTokens > span.end - span.cached) return;
  const int heads = call.layout.kv_heads;
  const std::int64_t bytes = bytes_of(source.dtype) * call.layout.head_dim;
  for (int t = kTileTokens * kv_head / heads; t < kTileTokens * (kv_head + 1) / heads; ++t) {
    for (int head = 0; head < heads; ++head) {
      const std::byte* row = row_address(source, span.first_row + first + t, head);
      for (std::int64_t at = 0; at < bytes; at += kLine) {
        static_cast<void>(*reinterpret_cast<const volatile unsigned char*>(row + at));
      }
    }
  }
}

inline void key_factors(const float* balance, int head_dim, float* factors) {
  for (int c = 0; c < head_dim; c += kLanes) {
    const Vf sign = load(kSigns.at + c);
    store(factors + c, balance == nullptr ? sign : sign / load(balance + c));
  }
}

inline void subtract_center(const float* center, int head_dim, float* columns) {
  for (int c = 0; c < head_dim; ++c) {
    float* y = columns + c * kTileTokens;
    for (int t = 0; t < kTileTokens; t += kLanes) store(y + t, load(y + t) - splat(center[c]));
  }
}

// What a KV head has besides its rows; null where the cache has none.
struct HeadConstants {
  const float* center;            // [head_dim]
  const std::uint16_t* feedback;  // [head_dim, head_dim]
};

template <int kBits>
inline void encode_keys(const TileLayout& layout, const HeadConstants& head, float* columns,
                        std::uint8_t* tile) {
  KeyParams params;
  std::uint8_t norms[kTileTokens];
  hadamard_columns(columns, layout.head_dim);
  if (head.center != nullptr) subtract_center(head.center, layout.head_dim, columns);
  scale_columns(columns, layout.head_dim, norms);
  quantize_keys<kBits>(columns, layout.head_dim, head.feedback != nullptr, params);
  if (head.feedback == nullptr) {
    pack_keys<kBits>(columns, layout.head_dim, params, tile + layout.k_codes_offset());
  } else {
    pack_fed_keys<kBits>(head.feedback, layout.head_dim, params, columns,
                         tile + layout.k_codes_offset());
  }
  std::memcpy(tile + layout.k_params_offset(), params.bytes,
              static_cast<std::size_t>(layout.head_dim));
  store_norms(norms, params.max_scale, params.max_mid, tile + layout.k_norms_offset());
  const int used = layout.used_bytes();
  std::memset(tile + used, 0, static_cast<std::size_t>(layout.tile_bytes() - used));
}

template <int kBits>
inline void encode_values(const TileLayout& layout, float* rows, std::uint8_t* tile) {
  alignas(64) float lows[kTileTokens];
  alignas(64) float highs[kTileTokens];
  for (int p = 0; p < kTileTokens; ++p) {
    float* row = rows + p * kMaxHeadDim;
    multiply_signs(row, layout.head_dim);
    hadamard_row(row, layout.head_dim);
    Vf low = load(row);
    Vf high = low;
    for (int c = kLanes; c < layout.head_dim; c += kLanes) {
      const Vf y = load(row + c);
      low = min(y, low);
      high = max(y, high);
    }
    lows[p] = -reduce_max(splat(0.0f) - low);
    highs[p] = reduce_max(high);
  }
  ValueParams params;
  quantize_values<kBits>(lows, highs, params);
  pack_values<kBits>(rows, layout.head_dim, params, tile + layout.v_codes_offset());
  std::memcpy(tile + layout.v_scales_offset(), params.scale_bytes, kTileTokens);
  std::memcpy(tile + layout.v_mids_offset(), params.mid_bytes, kTileTokens);
}

// One tile of one KV head; `rows` and `columns` are the thread's scratch.
inline void pack_tile(const AppendCall& call, const AppendSpan& span, int kv_head,
                      std::int64_t index, float* rows, float* columns) {
  const TileLayout layout = call.layout.tile();
  const CacheView& cache = call.cache;
  std::uint8_t* tile = tile_at(call.layout, cache, span.b, kv_head, index);
  alignas(64) float factors[kMaxHeadDim];
  key_factors(head_values(cache.balance, kv_head, layout.head_dim), layout.head_dim, factors);
  load_tile_rows(call, span, Side::kKey, kv_head, index, rows);
  read_ahead(call, span, call.k, kv_head, index);
  transpose_rows(rows, layout.head_dim, factors, columns);
  const HeadConstants head{head_values(cache.center, kv_head, layout.head_dim),
                           head_values(cache.feedback, kv_head, layout.head_dim * layout.head_dim)};
  if (layout.format.k_bits == 2) {
    encode_keys<2>(layout, head, columns, tile);
  } else {
    encode_keys<4>(layout, head, columns, tile);
  }
  load_tile_rows(call, span, Side::kValue, kv_head, index, rows);
  read_ahead(call, span, call.v, kv_head, index);
  if (layout.format.v_bits == 2) {
    encode_values<2>(layout, rows, tile);
  } else {
    encode_values<4>(layout, rows, tile);
  }
}

// Tiles first .. end - 1 of the call in the order (sequence, tile, KV head), that of the rows.
inline void pack_tiles(const AppendCall& call, std::int64_t first, std::int64_t end) {
  alignas(64) float rows[kTileTokens * kMaxHeadDim + kLanes];
  alignas(64) float columns[kMaxHeadDim * kTileTokens];
  // The vector behind a row's last channel goes into codes that are not stored: any number will do.
  for (int i = 0; i < kTileTokens * kMaxHeadDim + kLanes; i += kLanes) store(rows + i, splat(0.0f));
  for (int b = 0; b < call.batch.size && first < end; ++b) {
    const AppendSpan span = append_span(call, b);
    const std::int64_t count = span.tiles() * call.layout.kv_heads;
    const std::int64_t stop = end < count ? end : count;
    for (std::int64_t i = first; i < stop; ++i) {
      const auto kv_head = static_cast<int>(i % call.layout.kv_heads);
      pack_tile(call, span, kv_head, span.first_tile() + i / call.layout.kv_heads, rows, columns);
    }
    first = first > count ? first - count : 0;
    end -= count;
  }
}

inline void remember_row(const AppendCall& call, const AppendSpan& span, int side, int kv_head,
                         std::int64_t token) {
  const Layout& layout = call.layout;
  const ConstRows& source = side == Side::kKey ? call.k : call.v;
  const std::byte* row = row_address(source, span.first_row + token - span.cached, kv_head);
  alignas(64) float floats[kMaxHeadDim];
  std::byte exact[sizeof floats];
  if (source.dtype != layout.exact_dtype) {
    load_floats(row, source.dtype, layout.head_dim, floats);
    store_floats(floats, layout.exact_dtype, layout.head_dim, exact);
    row = exact;
  }
  const auto bytes = static_cast<std::size_t>(layout.head_dim * bytes_of(layout.exact_dtype));
  if (token >= span.end - layout.ring_tokens()) {
    std::memcpy(ring_address(layout, call.cache, span.b, side, kv_head, token), row, bytes);
  }
  if (token < layout.sinks) {
    std::memcpy(sink_address(layout, call.cache, span.b, side, kv_head, token), row, bytes);
  }
}

// Of a long call only the newest rows stay in the ring, and the first ones in the sinks.
inline void remember(const AppendCall& call, int b, int kv_head) {
  const AppendSpan span = append_span(call, b);
  const std::int64_t kept = span.end - call.layout.ring_tokens();
  for (const int side : {Side::kKey, Side::kValue}) {
    for (std::int64_t token = span.cached; token < span.end && token < call.layout.sinks; ++token) {
      remember_row(call, span, side, kv_head, token);
    }
    std::int64_t token = kept > span.cached ? kept : span.cached;
    if (token < call.layout.sinks) token = call.layout.sinks;
    for (; token < span.end; ++token) remember_row(call, span, side, kv_head, token);
  }
}

inline void append(const AppendCall& call) {
  std::int64_t tiles = 0;
  for (int b = 0; b < call.batch.size; ++b) tiles += append_span(call, b).tiles();
  tiles = call.part == AppendPart::kRemember ? 0 : tiles * call.layout.kv_heads;
  const std::int64_t rows = call.part == AppendPart::kPack
                                ? 0
                                : call.k.tokens * static_cast<std::int64_t>(call.layout.kv_heads);
  // Starting threads costs about as much as copying 64 rows.
  const std::int64_t work = tiles + rows / 64;
  const std::int64_t most = omp_get_max_threads();
  const auto threads = static_cast<int>(work < 2 ? 1 : work < most ? work : most);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const std::int64_t share = omp_get_num_threads();
    const std::int64_t thread = omp_get_thread_num();
    if (tiles > 0) pack_tiles(call, tiles * thread / share, tiles * (thread + 1) / share);
    if (rows > 0) {
      const std::int64_t pairs = static_cast<std::int64_t>(call.batch.size) * call.layout.kv_heads;
#pragma omp barrier
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < pairs; ++i) {
        remember(call, static_cast<int>(i / call.layout.kv_heads),
                 static_cast<int>(i % call.layout.kv_heads));
      }
    }
  }
}

}  // namespace
}  // namespace oscar::cpu
