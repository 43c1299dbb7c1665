// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Packed tiles with int8 dot products (AVX-512-VNNI), four codes a lane and instruction.
//
// K: a query row is rounded once to 11 bits and sign, q_c = query_scale i_c with |i_c| <= 2175. The
// integer scale indices of a tile then fold exactly: f_c = i_c i_s (at most 32625) = 256 hi + lo,
// two int8 operands for the codes, and
//   score = norm query_scale (U_s (256 hi . code + lo . code - N / 2 sum f) + U_m sum i_c i_m).
// V: weight times token scale, rounded to 8 bits once a step of 128 tokens; the terms that do not
// depend on the channel use the same rounded weights, so their error does not grow with mid.
#pragma once

#include "core/calls.hpp"

namespace oscar::cpu {
namespace {

inline constexpr float kMaxQueryIndex = 2175.0f;
inline constexpr float kMaxWeightIndex = 255.0f;

// int16 query indices stand, in blocks of 64 channels, as two vectors: channels 0..7 and 8..15 of
// every 16. That is how unpacklo/unpackhi spread 64 parameter bytes and how packs puts two vectors
// back into channel order.
struct PackedQuery {
  alignas(64) std::int16_t indices[kRowBlock][kMaxHeadDim];
  float scales[kRowBlock];
  alignas(64) std::int8_t high[kRowBlock][kMaxHeadDim];
  alignas(64) std::int8_t low[kRowBlock][kMaxHeadDim];
  float factors[kRowBlock];    // query_scale U_s
  float constants[kRowBlock];  // query_scale (U_m sum i_c i_m - U_s N / 2 sum f)
  alignas(64) std::uint8_t weights[kRowBlock][kStepTokens];
  float weight_scales[kRowBlock];
};

inline void prepare_packed(const TileLayout& layout, RowBlock& block, PackedQuery& query) {
  for (int r = 0; r < block.rows; ++r) {
    float* q = block.q_rotated[r];
    Vf highest = splat(0.0f);
    Vf nan = splat(0.0f);  // integers have no NaN: it goes into the scale
    for (int c = 0; c < layout.head_dim; c += kLanes) {
      highest = max(abs(load(q + c)), highest);
      nan = nan + load(q + c) * splat(0.0f);
    }
    const float most = reduce_max(highest);
    query.scales[r] = most / kMaxQueryIndex + reduce_add(nan);
    const Vf inverse = splat(most > 0.0f ? kMaxQueryIndex / most : 0.0f);
    std::memset(query.indices[r], 0, sizeof query.indices[r]);
    for (int c = 0; c < layout.head_dim; c += kLanes) {
      const __m256i i = _mm512_cvtsepi32_epi16(to_int(load(q + c) * inverse));
      std::int16_t* target = query.indices[r] + c / 64 * 64 + c % 64 / 2;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_castsi256_si128(i));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + 32), _mm256_extracti128_si256(i, 1));
    }
  }
}

struct FoldSums {
  __m512i folded;
  __m512i mids;
};

// f = 256 hi + lo with lo in -128..127, so that |hi| <= 127.
inline __m512i fold_half(__m512i index, __m512i scale, __m512i mid, __m512i& low, FoldSums& sums) {
  const __m512i folded = _mm512_mullo_epi16(index, scale);
  const __m512i high = _mm512_srai_epi16(_mm512_add_epi16(folded, _mm512_set1_epi16(128)), 8);
  low = _mm512_sub_epi16(folded, _mm512_slli_epi16(high, 8));
  sums.folded = _mm512_add_epi32(sums.folded, _mm512_madd_epi16(index, scale));
  sums.mids = _mm512_add_epi32(sums.mids, _mm512_madd_epi16(index, mid));
  return high;
}

template <int kBits>
inline void fold_scales(const TileLayout& layout, const std::uint8_t* tile, int rows,
                        PackedQuery& query) {
  std::uint16_t units[2];
  std::memcpy(units, tile + layout.k_units_offset(), sizeof units);
  const float scale_unit = half_to_float(units[0]) / static_cast<float>(kMaxScaleIndex);
  const float mid_unit = half_to_float(units[1]) / static_cast<float>(kMaxMidIndex);
  const Vf middle = splat(-0.5f * static_cast<float>(max_code(kBits)) * scale_unit);
  const __m512i zero = _mm512_setzero_si512();
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i mid_offset = _mm512_set1_epi16(kMaxMidIndex);
  FoldSums sums[kRowBlock];
  for (int r = 0; r < rows; ++r) sums[r] = {zero, zero};
  for (int c = 0; c < layout.head_dim; c += 64) {
    // Past head_dim: bytes of the next section, times query indices of 0.
    const __m512i params = load_int(tile + layout.k_params_offset() + c);
    const __m512i scales = _mm512_and_si512(params, nibble);
    const __m512i mids = _mm512_and_si512(_mm512_srli_epi16(params, 4), nibble);
    const __m512i scale_a = _mm512_unpacklo_epi8(scales, zero);
    const __m512i scale_b = _mm512_unpackhi_epi8(scales, zero);
    const __m512i mid_a = _mm512_sub_epi16(_mm512_unpacklo_epi8(mids, zero), mid_offset);
    const __m512i mid_b = _mm512_sub_epi16(_mm512_unpackhi_epi8(mids, zero), mid_offset);
    for (int r = 0; r < rows; ++r) {
      const __m512i index_a = load_int(query.indices[r] + c);
      const __m512i index_b = load_int(query.indices[r] + c + 32);
      __m512i low_a;
      __m512i low_b;
      const __m512i high_a = fold_half(index_a, scale_a, mid_a, low_a, sums[r]);
      const __m512i high_b = fold_half(index_b, scale_b, mid_b, low_b, sums[r]);
      store_int(query.high[r] + c, _mm512_packs_epi16(high_a, high_b));
      store_int(query.low[r] + c, _mm512_packs_epi16(low_a, low_b));
    }
  }
  for (int r = 0; r < rows; ++r) {
    const Vf constant =
        multiply_add(to_float(sums[r].folded), middle, to_float(sums[r].mids) * splat(mid_unit));
    query.factors[r] = query.scales[r] * scale_unit;
    query.constants[r] = query.scales[r] * reduce_add(constant);
  }
}

inline __m512i broadcast_dword(const void* source) {
  std::int32_t dword;
  std::memcpy(&dword, source, sizeof dword);
  return _mm512_set1_epi32(dword);
}

// The codes of plane i of every byte.
template <int kBits>
inline __m512i code_bytes(__m512i words, int i) {
  return _mm512_and_si512(_mm512_srli_epi16(words, static_cast<unsigned int>(kBits * i)),
                          _mm512_set1_epi8(static_cast<char>(max_code(kBits))));
}

// 32 positions of one tile. The broadcast dword d of a row is channels 4 d .. 4 d + 3, in the order
// in which lines and planes come.
template <int kBits, int kRows>
inline void dot_scores(const std::uint8_t* codes, const Vf (&norms)[2], int head_dim,
                       const PackedQuery& query, int row, float* scores) {
  constexpr int kPlanes = 8 / kBits;
  __m512i high_sums[kRows][2];
  __m512i low_sums[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) high_sums[r][h] = low_sums[r][h] = _mm512_setzero_si512();
  }
  const std::int8_t* high = query.high[row];
  const std::int8_t* low = query.low[row];
  for (int c = 0; c < head_dim; c += 4 * kPlanes, codes += 4 * kTileTokens) {
    const __m512i words[2] = {load_int(codes), load_int(codes + 64)};
#pragma GCC unroll 4
    for (int i = 0; i < kPlanes; ++i) {
      const __m512i code[2] = {code_bytes<kBits>(words[0], i), code_bytes<kBits>(words[1], i)};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512i q_high = broadcast_dword(high + r * kMaxHeadDim + c + 4 * i);
        const __m512i q_low = broadcast_dword(low + r * kMaxHeadDim + c + 4 * i);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          high_sums[r][h] = _mm512_dpbusd_epi32(high_sums[r][h], code[h], q_high);
          low_sums[r][h] = _mm512_dpbusd_epi32(low_sums[r][h], code[h], q_low);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Vf factor = splat(query.factors[row + r]);
    const Vf constant = splat(query.constants[row + r]);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(high_sums[r][h], 8), low_sums[r][h]);
      store(scores + r * kStepTokens + h * kLanes,
            multiply_add(to_float(dot), factor, constant) * norms[h]);
    }
  }
}

template <int kBits>
inline void tile_scores(const TileLayout& layout, const std::uint8_t* tile, int first,
                        RowBlock& block, PackedQuery& query) {
  fold_scales<kBits>(layout, tile, block.rows, query);
  const std::uint8_t* norm_bytes = tile + layout.k_norms_offset();
  const Vf norms[2] = {scale_of(load_u8(norm_bytes), kNormOffset),
                       scale_of(load_u8(norm_bytes + kLanes), kNormOffset)};
  for_row_groups(block.rows, [&]<int kRows>(int r) {
    dot_scores<kBits, kRows>(tile + layout.k_codes_offset(), norms, layout.head_dim, query, r,
                             block.scores[r] + first);
  });
}

inline void packed_scores(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  for (int i = 0; i < tiles.count; ++i) {
    if (tiles.layout.format.k_bits == 2) {
      tile_scores<2>(tiles.layout, tiles.at[i], i * kTileTokens, block, query);
    } else {
      tile_scores<4>(tiles.layout, tiles.at[i], i * kTileTokens, block, query);
    }
  }
}

// Weight times token scale of the step's positions, as 8 bits with one scale a row.
inline void round_weights(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  const int count = tiles.count * kTileTokens;
  Vf scales[kStepTokens / kLanes];
  for (int i = 0; i < count; i += kLanes) {
    const std::uint8_t* tile = tiles.at[i / kTileTokens];
    const std::uint8_t* bytes = tile + tiles.layout.v_scales_offset() + i % kTileTokens;
    scales[i / kLanes] = scale_of(load_u8(bytes), kVScaleOffset);
  }
  for (int r = 0; r < block.rows; ++r) {
    float* weights = block.scores[r];
    Vf highest = splat(0.0f);
    for (int i = 0; i < count; i += kLanes) {
      const Vf scaled = load(weights + i) * scales[i / kLanes];
      store(weights + i, scaled);
      highest = max(highest, scaled);
    }
    const float most = reduce_max(highest);
    query.weight_scales[r] = most / kMaxWeightIndex;
    const Vf inverse = splat(most > 0.0f ? kMaxWeightIndex / most : 0.0f);
    for (int i = 0; i < count; i += kLanes) {
      const __m512i index = to_int(load(weights + i) * inverse);
      _mm_store_si128(reinterpret_cast<__m128i*>(query.weights[r] + i),
                      _mm512_cvtusepi32_epi8(index));
    }
  }
}

// sum of weight (mid / 64 - N / 2), which every channel gets.
template <int kBits>
inline void add_offsets(const PackedTiles& tiles, RowBlock& block, const PackedQuery& query) {
  constexpr int kMiddle = max_code(kBits) * 32;  // N / 2 in units of mid
  const __m256i ones = _mm256_set1_epi8(1);
  for (int r = 0; r < block.rows; ++r) {
    __m256i mids = _mm256_setzero_si256();
    __m256i sums = _mm256_setzero_si256();
    for (int i = 0; i < tiles.count; ++i) {
      const std::uint8_t* mid_bytes = tiles.at[i] + tiles.layout.v_mids_offset();
      const __m256i mid = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mid_bytes));
      const __m256i weight =
          _mm256_load_si256(reinterpret_cast<const __m256i*>(query.weights[r] + i * kTileTokens));
      mids = _mm256_dpbusd_epi32(mids, weight, mid);
      sums = _mm256_dpbusd_epi32(sums, weight, ones);
    }
    const __m256i offset =
        _mm256_sub_epi32(mids, _mm256_mullo_epi32(sums, _mm256_set1_epi32(kMiddle)));
    const __m256 factor = _mm256_set1_ps(query.weight_scales[r] * kVMidUnit);
    float* target = block.offset[r];
    _mm256_store_ps(target,
                    _mm256_fmadd_ps(_mm256_cvtepi32_ps(offset), factor, _mm256_load_ps(target)));
  }
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
      const std::uint8_t* codes = tiles.at[t] + tiles.layout.v_codes_offset() + 4 * j;
#pragma GCC unroll 8
      for (int quad = 0; quad < kTileTokens / 4;
           ++quad, codes += 4 * group_channels, weights += 4) {
        const __m512i words = load_int(codes);
        __m512i code[kGroups];
#pragma GCC unroll 4
        for (int i = 0; i < kGroups; ++i) code[i] = code_bytes<kBits>(words, i);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512i weight = broadcast_dword(weights + r * kStepTokens);
#pragma GCC unroll 4
          for (int i = 0; i < kGroups; ++i) {
            sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], weight, code[i]);
          }
        }
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

inline void add_packed_values(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  round_weights(tiles, block, query);
  if (tiles.layout.format.v_bits == 2) {
    add_offsets<2>(tiles, block, query);
    for_row_groups(block.rows, [&]<int kRows>(int r) {
      dot_values<2, kRows>(tiles, query, r, block.out_rotated[r]);
    });
  } else {
    add_offsets<4>(tiles, block, query);
    for_row_groups(block.rows, [&]<int kRows>(int r) {
      dot_values<4, kRows>(tiles, query, r, block.out_rotated[r]);
    });
  }
}

}  // namespace
}  // namespace oscar::cpu
