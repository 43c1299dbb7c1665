// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// page: which copy of a token a query reads, and its values.
#pragma once

#include <cstdint>

#include "core/rows.hpp"
#include "oscar/cache.hpp"
#include "reference/quantize.hpp"

namespace oscar::reference {

enum class Copy { kPacked, kSink, kRing, kCall };

// The copy of token `position` that is read by a query for which the first `packed` tiles of the
// sequence are packed ones (packed_tiles), if `cached` tokens were there before the call.
Copy copy_of(const Layout& layout, std::int64_t position, std::int64_t packed, std::int64_t cached);

// k, v [head_dim] of a token (0..31) of an unpacked tile, in the rotated basis. center [head_dim]
// of the tile's KV head, or null (= 0).
void read_packed(const TileLayout& layout, const Tile& tile, const float* center, int token,
                 double* k, double* v);

// k, v [head_dim] of token `position` of sequence b, kSink or kRing, in the original basis.
void read_exact(const Layout& layout, const CacheView& cache, int b, int kv_head, Copy copy,
                std::int64_t position, float* k, float* v);

// k, v [head_dim], original basis: the row that a query at `query_position` reads for the cached
// token `position` < seq_len[b], exact or dequantised, without `strict`.
void dequantize(const Layout& layout, const CacheView& cache, int b, std::int64_t position,
                std::int64_t query_position, int kv_head, float* k, float* v);

}  // namespace oscar::reference
