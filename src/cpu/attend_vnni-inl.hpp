// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The inner kernels of attend_int8-inl.hpp with AVX-512-VNNI: four codes a lane and instruction,
// 32-bit sums, four rows in registers.
#pragma once

#include "core/calls.hpp"

namespace oscar::cpu {
namespace {

// The codes of plane i of every byte.
template <int kBits>
inline __m512i code_bytes(__m512i words, int i) {
  return _mm512_and_si512(_mm512_srli_epi16(words, static_cast<unsigned int>(kBits * i)),
                          _mm512_set1_epi8(static_cast<char>(max_code(kBits))));
}

template <int kRows>
struct ScoreSums {
  __m512i high[kRows][2];
  __m512i low[kRows][2];
};

template <int kRows>
inline void finish_scores(const ScoreSums<kRows>& sums, const std::uint8_t* norm_bytes,
                          const PackedQuery& query, int row, float* scores) {
  const Vf norms[2] = {scale_of(load_u8(norm_bytes), kNormOffset),
                       scale_of(load_u8(norm_bytes + kLanes), kNormOffset)};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Vf factor = splat(query.factors[row + r]);
    const Vf constant = splat(query.constants[row + r]);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i dot = add_int(shift_left(sums.high[r][h], 8), sums.low[r][h]);
      store(scores + r * kStepTokens + h * kLanes,
            multiply_add(to_float(dot), factor, constant) * norms[h]);
    }
  }
}

// The broadcast dword d of a row is channels 4 d .. 4 d + 3, in the order in which lines and planes
// come.
template <int kBits, int kRows>
inline void dot_scores(const TileLayout& layout, TilePair pair, const PackedQuery& query, int row,
                       float* scores) {
  constexpr int kPlanes = 8 / kBits;
  ScoreSums<kRows> sums;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) sums.high[r][h] = sums.low[r][h] = _mm512_setzero_si512();
  }
  const std::int8_t* high = query.high[row];
  const std::int8_t* low = query.low[row];
  const std::uint8_t* codes = pair.tile + layout.k_codes_offset();
  const std::uint8_t* next = pair.next + layout.k_codes_offset();
  for (int c = 0; c < layout.head_dim; c += 4 * kPlanes) {
    const __m512i words[2] = {load_int(codes), load_int(codes + 64)};
    prefetch(next);
    prefetch(next + 64);
    codes += 4 * kTileTokens;
    next += 4 * kTileTokens;
#pragma GCC unroll 4
    for (int i = 0; i < kPlanes; ++i) {
      const __m512i code[2] = {code_bytes<kBits>(words[0], i), code_bytes<kBits>(words[1], i)};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512i q_high = splat_dword(high + r * kMaxHeadDim + c + 4 * i);
        const __m512i q_low = splat_dword(low + r * kMaxHeadDim + c + 4 * i);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          sums.high[r][h] = _mm512_dpbusd_epi32(sums.high[r][h], code[h], q_high);
          sums.low[r][h] = _mm512_dpbusd_epi32(sums.low[r][h], code[h], q_low);
        }
      }
    }
  }
  finish_scores(sums, pair.tile + layout.k_norms_offset(), query, row, scores);
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
        __m512i code[kGroups];
#pragma GCC unroll 4
        for (int i = 0; i < kGroups; ++i) code[i] = code_bytes<kBits>(words, i);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512i weight = splat_dword(weights + r * kStepTokens);
#pragma GCC unroll 4
          for (int i = 0; i < kGroups; ++i) {
            sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], weight, code[i]);
          }
        }
        weights += 4;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vf factor = splat(query.weight_scales[row + r]);
#pragma GCC unroll 4
      for (int i = 0; i < kGroups; ++i) {
        float* target = out + r * kMaxHeadDim + i * padded + j;
        store(target, multiply_add(to_float(sums[r][i]), factor, load(target)));
      }
    }
  }
}

}  // namespace
}  // namespace oscar::cpu
