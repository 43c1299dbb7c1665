// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
#include "reference/page.hpp"

#include "reference/pack.hpp"
#include "reference/rotate.hpp"
#include "reference/scale.hpp"

namespace oscar::reference {

Copy copy_of(const Layout& layout, std::int64_t position, std::int64_t packed,
             std::int64_t cached) {
  const bool in_call = position >= cached;
  if (position < layout.sinks) return in_call ? Copy::kCall : Copy::kSink;
  if (position / kTileTokens < packed) return Copy::kPacked;
  return in_call ? Copy::kCall : Copy::kRing;
}

void read_packed(const TileLayout& layout, const Tile& tile, const float* center, int token,
                 double* k, double* v) {
  const double k_middle = 0.5 * max_code(layout.format.k_bits);
  const double v_middle = 0.5 * max_code(layout.format.v_bits);
  const double scale_unit = bf16_to_float(tile.k_max_scale) / double{kMaxScaleSteps};
  const double mid_unit = bf16_to_float(tile.k_max_mid) / double{kMaxMidIndex};
  const double norm = stored_norm_of(tile.k_norms[token]);
  const double v_scale = value_scale_of(tile.v_scales[token]);
  const double v_mid = tile.v_mids[token] * double{kVMidUnit};
  for (int c = 0; c < layout.head_dim; ++c) {
    const double scale = key_scale_steps(tile.k_scales[c]) * scale_unit;
    k[c] = norm * (tile.k_mids[c] * mid_unit + scale * (tile.k_codes[token][c] - k_middle));
    if (center != nullptr) k[c] += center[c];
    v[c] = v_scale * (v_mid + tile.v_codes[token][c] - v_middle);
  }
}

void read_exact(const Layout& layout, const CacheView& cache, int b, int kv_head, Copy copy,
                std::int64_t position, float* k, float* v) {
  const std::int64_t row =
      copy == Copy::kSink ? sink_row(layout, position) : ring_row(layout, position);
  load_row(exact_row(layout, cache, b, Side::kKey, kv_head, row), layout.exact_dtype,
           layout.head_dim, k);
  load_row(exact_row(layout, cache, b, Side::kValue, kv_head, row), layout.exact_dtype,
           layout.head_dim, v);
}

void dequantize(const Layout& layout, const CacheView& cache, int b, std::int64_t position,
                std::int64_t query_position, int kv_head, float* k, float* v) {
  const std::int64_t cached = cache.seq_len[b];
  const std::int64_t exact_from = cache.exact_from == nullptr ? 0 : cache.exact_from[b];
  const std::int64_t packed = packed_tiles(layout, query_position, cached, exact_from);
  const Copy copy = copy_of(layout, position, packed, cached);
  if (copy != Copy::kPacked) {
    read_exact(layout, cache, b, kv_head, copy, position, k, v);
    return;
  }
  Tile tile;
  unpack(layout.tile(), tile_address(layout, cache, b, kv_head, position / kTileTokens), tile);
  double key[kMaxHeadDim];
  double value[kMaxHeadDim];
  read_packed(layout.tile(), tile, head_values(cache.center, layout, kv_head),
              static_cast<int>(position % kTileTokens), key, value);
  const float* balance = head_values(cache.balance, layout, kv_head);
  unrotate_row(Row::kKey, layout.head_dim, balance, key);
  unrotate_row(Row::kValue, layout.head_dim, balance, value);
  for (int c = 0; c < layout.head_dim; ++c) {
    k[c] = static_cast<float>(key[c]);
    v[c] = static_cast<float>(value[c]);
  }
}

}  // namespace oscar::reference
