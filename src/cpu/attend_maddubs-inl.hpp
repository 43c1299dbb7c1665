// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The inner kernels of attend_int8-inl.hpp with AVX2: vpmaddubsw adds two products into 16 bits,
// vpaddw as many of those as fit, then vpmaddwd widens. Eight sums in registers: four rows of hi
// and lo for K, of two channel groups for V.
#pragma once

#include "core/calls.hpp"

namespace oscar::cpu {
namespace {

// Instructions whose sums stay below 2^15: each adds 2 codes times a query byte (at most 128 in
// magnitude) or a weight (at most 255).
constexpr int sums_of_16_bits(int bits, int most) { return 32767 / (2 * max_code(bits) * most); }

// The codes of plane kPlane of every byte.
template <int kBits>
inline Vi code_bytes(Vi words, int plane) {
  return and_int(_mm256_srli_epi16(words, kBits * plane), splat_i8(max_code(kBits)));
}

// The empty statement keeps the compiler from adding in another order, which takes more registers
// than there are.
inline Vi add_products(Vi sum, Vi u, Vi s) {
  sum = add_i16(sum, _mm256_maddubs_epi16(u, s));
  __asm__("" : "+x"(sum));
  return sum;
}
inline Vi add_pairs(Vi sum, Vi v) { return dot_i16(sum, v, splat_i16(1)); }

// code s_c of one plane: the table of its four channels, indexed by code and byte.
template <int kPlane>
inline Vi scaled_codes(Vi words, Vi table) {
  const Vi code = and_int(words, splat_i8(kPlane % 2 == 0 ? 0x03 : 0x0c));
  return shuffle_bytes(table,
                       _mm256_or_si256(code, splat_int(kPlane % 2 == 0 ? 0x0c080400 : 0x03020100)));
}

// Scores of kLanes positions from their sums.
template <int kRows>
inline void finish_scores(const TileLayout& layout, const TilePair& pair, const PackedQuery& query,
                          int row, int p, const Vi (&sums)[kRows], float* scores) {
  const Vf norms = norms_of(pair.tile + layout.k_norms_offset() + p);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Vf factor = splat(query.factors[pair.index][row + r]);
    const Vf constant = splat(query.constants[pair.index][row + r]);
    store(scores + r * kStepTokens + p, multiply_add(to_float(sums[r]), factor, constant) * norms);
  }
}

// The broadcast dword d of a row is channels 4 d .. 4 d + 3, in the order in which lines and planes
// come. kLanes positions from p on.
template <int kRows>
inline void dot_tables(const TileLayout& layout, const TilePair& pair, const PackedQuery& query,
                       int row, int p, Vi (&sums)[kRows]) {
  // Each instruction adds two products of at most 18 * 127 to 16 bits, a line has four.
  constexpr int kChunk = 16;
  static_assert(2 * 3 * kMaxScaleSteps * 127 * 4 <= 32767);
  const std::uint8_t* codes = pair.tile + layout.k_codes_offset() + 4 * p;
  const std::uint8_t* next = pair.next + layout.k_codes_offset() + 4 * p;
  for (int c = 0; c < layout.head_dim; c += kChunk) {
    const Vi words = load_int(codes);
    prefetch(next);
    codes += 4 * kTileTokens;
    next += 4 * kTileTokens;
    const Vi shifted = _mm256_srli_epi16(words, 4);
    const std::uint8_t* tables = query.tables[pair.index][c / 4];
    const Vi code[4] = {scaled_codes<0>(words, splat_16_bytes(tables)),
                        scaled_codes<1>(words, splat_16_bytes(tables + 16)),
                        scaled_codes<2>(shifted, splat_16_bytes(tables + 32)),
                        scaled_codes<3>(shifted, splat_16_bytes(tables + 48))};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const std::int8_t* q = query.bytes[row + r] + c;
      Vi products = _mm256_maddubs_epi16(code[0], splat_dword(q));
#pragma GCC unroll 3
      for (int i = 1; i < 4; ++i) {
        products = add_i16(products, _mm256_maddubs_epi16(code[i], splat_dword(q + 4 * i)));
      }
      sums[r] = add_pairs(sums[r], products);
    }
  }
}

// kLanes positions from p on.
template <int kRows>
inline void dot_halves(const TileLayout& layout, const TilePair& pair, const PackedQuery& query,
                       int row, int p, Vi (&sums)[kRows]) {
  constexpr int kChunk = 32;  // channels whose sums fit 16 bits
  static_assert(kChunk / 4 <= sums_of_16_bits(4, 128));
  const std::uint8_t* codes = pair.tile + layout.k_codes_offset() + 4 * p;
  const std::uint8_t* next = pair.next + layout.k_codes_offset() + 4 * p;
  for (int chunk = 0; chunk < layout.head_dim; chunk += kChunk) {
    const int end = chunk + kChunk < layout.head_dim ? chunk + kChunk : layout.head_dim;
    Vi high_sums[kRows];
    Vi low_sums[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) high_sums[r] = low_sums[r] = splat_int(0);
    for (int c = chunk; c < end; c += 8) {
      const Vi words = load_int(codes);
      prefetch(next);
      codes += 4 * kTileTokens;
      next += 4 * kTileTokens;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Vi code = code_bytes<4>(words, i);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vi high = splat_dword(query.high[row + r] + c + 4 * i);
          const Vi low = splat_dword(query.low[row + r] + c + 4 * i);
          high_sums[r] = add_products(high_sums[r], code, high);
          low_sums[r] = add_products(low_sums[r], code, low);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vi high = shift_left(add_pairs(splat_int(0), high_sums[r]), 8);
      sums[r] = add_pairs(add_int(sums[r], high), low_sums[r]);
    }
  }
}

template <int kRows>
inline void dot_folded(const TileLayout& layout, TilePair pair, const PackedQuery& query, int row,
                       float* scores) {
  for (int p = 0; p < kTileTokens; p += kLanes) {
    Vi sums[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r] = splat_int(0);
    dot_halves<kRows>(layout, pair, query, row, p, sums);
    finish_scores<kRows>(layout, pair, query, row, p, sums, scores);
  }
}

template <int kRows>
inline void dot_step(const PackedTiles& tiles, const PackedQuery& query, int row, float* scores) {
  for (int i = 0; i < tiles.count; ++i) {
    const TilePair pair = pair_of(tiles, i);
    for (int p = 0; p < kTileTokens; p += kLanes) {
      Vi sums[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r] = splat_int(0);
      dot_tables<kRows>(tiles.layout, pair, query, row, p, sums);
      finish_scores<kRows>(tiles.layout, pair, query, row, p, sums, scores + i * kTileTokens);
    }
  }
}

// Groups kFirst and kFirst + 1, kLanes channels of each from j on.
template <int kBits, int kRows, int kFirst>
inline void dot_two_groups(const PackedTiles& tiles, const PackedQuery& query, int row, int j,
                           float* out) {
  constexpr int kChunk = kBits == 2 ? 16 : 4;  // quads
  static_assert(kChunk <= sums_of_16_bits(kBits, 255));
  const int stride = 4 * tiles.layout.v_group_channels();
  Vi sums[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = splat_int(0);
  const std::uint8_t* weights = query.weights[row];
  for (int chunk = 0; chunk < tiles.count * (kTileTokens / 4); chunk += kChunk) {
    Vi short_sums[kRows][2];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) short_sums[r][0] = short_sums[r][1] = splat_int(0);
    for (int part = 0; part < kChunk; part += 4) {
      const int tile = (chunk + part) / (kTileTokens / 4);
      if (tile >= tiles.count) break;
      const int offset =
          tiles.layout.v_codes_offset() + 4 * j + (chunk + part) % (kTileTokens / 4) * stride;
      const std::uint8_t* codes = tiles.at[tile] + offset;
      const std::uint8_t* next = tiles.next[tile] + offset;
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; ++quad) {
        const Vi words = load_int(codes);
        if constexpr (kFirst == 0) prefetch(next);
        codes += stride;
        next += stride;
        const Vi code[2] = {code_bytes<kBits>(words, kFirst), code_bytes<kBits>(words, kFirst + 1)};
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vi weight = splat_dword(weights + r * kStepTokens);
          short_sums[r][0] = add_products(short_sums[r][0], weight, code[0]);
          short_sums[r][1] = add_products(short_sums[r][1], weight, code[1]);
        }
        weights += 4;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] = add_pairs(sums[r][0], short_sums[r][0]);
      sums[r][1] = add_pairs(sums[r][1], short_sums[r][1]);
    }
  }
  const int padded = padded_group(tiles.layout);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Vf factor = splat(query.weight_scales[row + r]);
    float* target = out + r * kMaxHeadDim + kFirst * padded + j;
    store(target, multiply_add(to_float(sums[r][0]), factor, load(target)));
    target += padded;
    store(target, multiply_add(to_float(sums[r][1]), factor, load(target)));
  }
}

// A vector may run past its group into words of the next quad or section: those lanes end in the
// padding of out_rotated.
template <int kBits, int kRows>
inline void dot_values(const PackedTiles& tiles, const PackedQuery& query, int row, float* out) {
  for (int j = 0; j < tiles.layout.v_group_channels(); j += kLanes) {
    dot_two_groups<kBits, kRows, 0>(tiles, query, row, j, out);
    if constexpr (kBits == 2) dot_two_groups<kBits, kRows, 2>(tiles, query, row, j, out);
  }
}

}  // namespace
}  // namespace oscar::cpu
