// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The inner kernels of attend_int8-inl.hpp with AVX-512-VNNI: four codes a lane and instruction,
// 32-bit sums, four rows in registers.
#pragma once

#include "core/calls.hpp"

namespace oscar::cpu {
namespace {

// The empty statement ties the sum to its register: left alone, GCC renames sums in unrolled loops
// until some of them live on the stack.
inline __m512i add_dots(__m512i sum, __m512i u, __m512i s) {
  sum = _mm512_dpbusd_epi32(sum, u, s);
  __asm__("" : "+v"(sum));
  return sum;
}

inline void finish_scores(__m512i dot, float factor, float constant, Vf norms, float* scores) {
  store(scores, multiply_add(to_float(dot), splat(factor), splat(constant)) * norms);
}

struct TileNorms {
  Vf halves[2];
};
inline TileNorms tile_norms(const TileLayout& layout, const std::uint8_t* tile) {
  const std::uint8_t* bytes = tile + layout.k_norms_offset();
  return {{norms_of(bytes), norms_of(bytes + kLanes)}};
}

// code s_c of one plane: the table of its four channels, indexed by code and byte.
template <int kPlane>
inline __m512i scaled_codes(__m512i words, __m512i table) {
  const __m512i code = _mm512_set1_epi8(kPlane % 2 == 0 ? 0x03 : 0x0c);
  const __m512i byte = _mm512_set1_epi32(kPlane % 2 == 0 ? 0x0c080400 : 0x03020100);
  return _mm512_shuffle_epi8(table, _mm512_ternarylogic_epi32(words, code, byte, 0xea));
}

// The K words of a line of kTiles tiles, as halves of 16 positions, and their tables.
template <int kTiles>
struct KeyLine {
  const std::uint8_t* codes[kTiles];
  const std::uint8_t* next[kTiles];
  const std::uint8_t* tables[kTiles];
};

template <int kTiles, int kRows>
using ScoreSums = __m512i[kRows][2 * kTiles];

// Four channels of kRows rows: dword kPlane of a line of q.
template <int kPlane, int kTiles, int kRows>
inline void add_plane(const __m512i (&words)[2 * kTiles], const KeyLine<kTiles>& line,
                      const std::int8_t* q, ScoreSums<kTiles, kRows>& sums) {
  __m512i code[2 * kTiles];
#pragma GCC unroll 2
  for (int t = 0; t < kTiles; ++t) {
    const __m512i table = splat_16_bytes(line.tables[t] + 16 * kPlane);
    code[2 * t] = scaled_codes<kPlane>(words[2 * t], table);
    code[2 * t + 1] = scaled_codes<kPlane>(words[2 * t + 1], table);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m512i dword = splat_dword(q + r * kMaxHeadDim + 4 * kPlane);
#pragma GCC unroll 4
    for (int h = 0; h < 2 * kTiles; ++h) {
      sums[r][h] = add_dots(sums[r][h], code[h], dword);
    }
  }
}

// 2 bits: tiles first .. first + kTiles - 1 of a step. Two at a time, because q does not depend on
// the tile: half the broadcasts.
template <int kTiles, int kRows>
inline void dot_tables(const PackedTiles& tiles, int first, const PackedQuery& query, int row,
                       float* scores) {
  ScoreSums<kTiles, kRows> sums;
  KeyLine<kTiles> line;
#pragma GCC unroll 2
  for (int t = 0; t < kTiles; ++t) {
    line.codes[t] = tiles.at[first + t] + tiles.layout.k_codes_offset();
    line.next[t] = tiles.next[first + t] + tiles.layout.k_codes_offset();
    line.tables[t] = query.tables[first + t][0];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r][2 * t] = sums[r][2 * t + 1] = _mm512_setzero_si512();
  }
  const std::int8_t* q = query.bytes[row];
  for (const std::int8_t* end = q + tiles.layout.head_dim; q < end; q += 16) {
    __m512i words[2 * kTiles];
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
      words[2 * t] = load_int(line.codes[t]);
      words[2 * t + 1] = load_int(line.codes[t] + 64);
      prefetch(line.next[t]);
      prefetch(line.next[t] + 64);
      line.codes[t] += 4 * kTileTokens;
      line.next[t] += 4 * kTileTokens;
    }
    add_plane<0, kTiles, kRows>(words, line, q, sums);
    add_plane<1, kTiles, kRows>(words, line, q, sums);
#pragma GCC unroll 4
    for (int h = 0; h < 2 * kTiles; ++h) words[h] = _mm512_srli_epi16(words[h], 4);
    add_plane<2, kTiles, kRows>(words, line, q, sums);
    add_plane<3, kTiles, kRows>(words, line, q, sums);
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) line.tables[t] += 64;
  }
#pragma GCC unroll 2
  for (int t = 0; t < kTiles; ++t) {
    const TileNorms norms = tile_norms(tiles.layout, tiles.at[first + t]);
    const float* factors = query.factors[first + t] + row;
    const float* constants = query.constants[first + t] + row;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        finish_scores(sums[r][2 * t + h], factors[r], constants[r], norms.halves[h],
                      scores + r * kStepTokens + (first + t) * kTileTokens + h * kLanes);
      }
    }
  }
}

template <int kRows>
inline void dot_step(const PackedTiles& tiles, const PackedQuery& query, int row, float* scores) {
  int i = 0;
  for (; i + 2 <= tiles.count; i += 2) dot_tables<2, kRows>(tiles, i, query, row, scores);
  if (i < tiles.count) dot_tables<1, kRows>(tiles, i, query, row, scores);
}

// The nibbles of plane i of every byte.
inline __m512i nibbles(__m512i words, int i) {
  return _mm512_and_si512(_mm512_srli_epi16(words, static_cast<unsigned int>(4 * i)),
                          _mm512_set1_epi8(15));
}

// 4 bits. Half a tile at a time: of 32 positions, high and low sums of four rows would leave too
// few registers.
template <int kRows>
inline void dot_folded(const TileLayout& layout, TilePair pair, const PackedQuery& query, int row,
                       float* scores) {
  const TileNorms norms = tile_norms(layout, pair.tile);
  for (int h = 0; h < 2; ++h) {
    __m512i high_sums[kRows];
    __m512i low_sums[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) high_sums[r] = low_sums[r] = _mm512_setzero_si512();
    const std::uint8_t* codes = pair.tile + layout.k_codes_offset() + 64 * h;
    const std::uint8_t* next = pair.next + layout.k_codes_offset() + 64 * h;
    for (int c = 0; c < layout.head_dim; c += 8) {
      const __m512i words = load_int(codes);
      prefetch(next);
      codes += 4 * kTileTokens;
      next += 4 * kTileTokens;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m512i code = nibbles(words, i);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512i high = splat_dword(query.high[row + r] + c + 4 * i);
          const __m512i low = splat_dword(query.low[row + r] + c + 4 * i);
          high_sums[r] = add_dots(high_sums[r], code, high);
          low_sums[r] = add_dots(low_sums[r], code, low);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i dot = add_int(shift_left(high_sums[r], 8), low_sums[r]);
      finish_scores(dot, query.factors[pair.index][row + r], query.constants[pair.index][row + r],
                    norms.halves[h], scores + r * kStepTokens + h * kLanes);
    }
  }
}

// What stands in a byte of plane i of V: the code, times 4 where that saves a shift.
template <int kBits, int kPlane>
inline __m512i plane_codes(__m512i words, __m512i shifted) {
  if constexpr (kBits == 4) return _mm512_and_si512(kPlane == 0 ? words : shifted, splat_i8(15));
  return _mm512_and_si512(kPlane < 2 ? words : shifted, splat_i8(kPlane % 2 == 0 ? 3 : 12));
}
template <int kBits>
constexpr float plane_factor(int plane) {
  return kBits == 2 && plane % 2 == 1 ? 0.25f : 1.0f;
}

// A vector may run past its group into words of the next quad or section: those lanes end in the
// padding of out_rotated.
template <int kBits, int kRows>
inline void dot_values(const PackedTiles& tiles, const PackedQuery& query, int row, float* out) {
  constexpr int kGroups = 8 / kBits;
  const int group_channels = tiles.layout.v_group_channels();
  const int padded = padded_group(tiles.layout);
  for (int j = 0; j < group_channels; j += kLanes) {
    __m512i sums[kRows][kGroups];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kGroups; ++i) sums[r][i] = _mm512_setzero_si512();
    }
    const std::uint8_t* weights = query.weights[row];
    for (int t = 0; t < tiles.count; ++t) {
      const int offset = tiles.layout.v_codes_offset() + 4 * j;
      const std::uint8_t* codes = tiles.at[t] + offset;
      const std::uint8_t* next = tiles.next[t] + offset;
#pragma GCC unroll 8
      for (int quad = 0; quad < kTileTokens / 4; ++quad) {
        const __m512i words = load_int(codes);
        prefetch(next);
        codes += 4 * group_channels;
        next += 4 * group_channels;
        const __m512i shifted = _mm512_srli_epi16(words, 4);
        __m512i code[kGroups] = {plane_codes<kBits, 0>(words, shifted),
                                 plane_codes<kBits, 1>(words, shifted)};
        if constexpr (kBits == 2) {
          code[2] = plane_codes<kBits, 2>(words, shifted);
          code[3] = plane_codes<kBits, 3>(words, shifted);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512i weight = splat_dword(weights + r * kStepTokens);
#pragma GCC unroll 4
          for (int i = 0; i < kGroups; ++i) {
            sums[r][i] = add_dots(sums[r][i], weight, code[i]);
          }
        }
        weights += 4;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kGroups; ++i) {
        const Vf factor = splat(query.weight_scales[row + r] * plane_factor<kBits>(i));
        float* target = out + r * kMaxHeadDim + i * padded + j;
        store(target, multiply_add(to_float(sums[r][i]), factor, load(target)));
      }
    }
  }
}

}  // namespace
}  // namespace oscar::cpu
