// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Packed tiles with int8 dot products: what does not depend on how an instruction set multiplies
// bytes. attend_vnni-inl.hpp and attend_maddubs-inl.hpp have the two inner kernels, which end in
// the same integers.
//
// K: a query row is rounded once to 11 bits and sign, q_c = query_scale i_c with |i_c| <= 2175. The
// integer scale indices of a tile then fold exactly: f_c = i_c i_s (at most 32625) = 256 hi + lo,
// two int8 operands for the codes, and
//   score = norm query_scale (U_s (256 hi . code + lo . code - N / 2 sum f) + U_m sum i_c i_m).
// V: weight times token scale, rounded to 8 bits once a step of 128 tokens; the terms that do not
// depend on the channel use the same rounded weights, so their error does not grow with mid.
//
// With each line it reads, a kernel prefetches the same line of the next step: the few KB that a
// page holds of one KV head are too short a run for the hardware to get ahead. Bursts of prefetches
// at one place, or into L2 only, are slower.
#pragma once

#include "core/calls.hpp"

namespace oscar::cpu {
namespace {

inline constexpr float kMaxQueryIndex = 2175.0f;
inline constexpr float kMaxWeightIndex = 255.0f;

struct PackedQuery {
  // i_c in blocks of kBytes channels, in the order of widen_low and widen_high, zeros behind.
  alignas(64) std::int16_t indices[kRowBlock][kMaxHeadDim];
  alignas(16) float scales[kRowBlock];
  alignas(16) float index_sums[kRowBlock];  // sum i_c
  // Of one tile: f_c = 256 high + low, by channel.
  alignas(64) std::int8_t high[kRowBlock][kMaxHeadDim];
  alignas(64) std::int8_t low[kRowBlock][kMaxHeadDim];
  alignas(16) float factors[kRowBlock];    // query_scale U_s
  alignas(16) float constants[kRowBlock];  // query_scale (U_m sum i_c i_m - U_s N / 2 sum f)
  alignas(64) std::uint8_t weights[kRowBlock][kStepTokens];
  float weight_scales[kRowBlock];
};

// Tile i of a step, and the one whose lines are prefetched meanwhile.
struct TilePair {
  const std::uint8_t* tile;
  const std::uint8_t* next;
};

// The kernels of the target.
// block.scores[r][first + position] for kRows rows, 32 positions.
template <int kBits, int kRows>
void dot_scores(const TileLayout& layout, TilePair pair, const PackedQuery& query, int row,
                float* scores);
// out[r] += weight_scales[r] sum over the step of weights[r][position] code.
template <int kBits, int kRows>
void dot_values(const PackedTiles& tiles, const PackedQuery& query, int row, float* out);

// v = 256 high + low with low in -128..127, as bytes; the order of widen_low and widen_high.
inline void store_halves(Vi a, Vi b, std::int8_t* high, std::int8_t* low) {
  const Vi half = splat_i16(128);
  const Vi byte = splat_i16(255);
  store_int(high,
            narrow_i8(shift_right_i16<8>(add_i16(a, half)), shift_right_i16<8>(add_i16(b, half))));
  store_int(low, narrow_u8(and_int(a, byte), and_int(b, byte)));
}

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
    alignas(64) std::int16_t indices[kMaxHeadDim] = {};
    Vf sum = splat(0.0f);
    for (int c = 0; c < layout.head_dim; c += kLanes) {
      const Vi index = to_int(load(q + c) * inverse);
      store_i16(indices + c, index);
      sum = sum + to_float(index);
    }
    query.index_sums[r] = reduce_add(sum);
    for (int c = 0; c < layout.head_dim; c += kBytes) {
      for (int i = 0; i < kBytes; i += 16) {
        std::int16_t* target = query.indices[r] + c + i / 2;
        std::memcpy(target, indices + c + i, 16);
        std::memcpy(target + kBytes / 2, indices + c + i + 8, 16);
      }
    }
  }
  for (int r = block.rows; r % 4 != 0; ++r) query.scales[r] = query.index_sums[r] = 0.0f;
}

struct KeyUnits {
  float scale;
  float mid;
};

inline KeyUnits key_units(const TileLayout& layout, const std::uint8_t* tile) {
  std::uint16_t units[2];
  std::memcpy(units, tile + layout.k_units_offset(), sizeof units);
  return {half_to_float(units[0]) * (1.0f / kMaxScaleIndex),
          half_to_float(units[1]) * (1.0f / kMaxMidIndex)};
}

// The operands and factors of rows row .. row + kRows - 1 for one tile, four factors at once;
// `middle` is N / 2.
template <int kRows>
inline void fold_scales(const TileLayout& layout, const std::uint8_t* tile, float middle, int row,
                        PackedQuery& query) {
  const std::uint8_t* params = tile + layout.k_params_offset();
  const Vi nibble = splat_i8(15);
  Vi scale_sums[kRows];
  Vi mid_sums[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) scale_sums[r] = mid_sums[r] = splat_int(0);
  for (int c = 0; c < layout.head_dim; c += kBytes) {
    // Past head_dim: bytes of the next section, times query indices of 0.
    const Vi bytes = load_int(params + c);
    const Vi scales = and_int(bytes, nibble);
    const Vi mids = and_int(shift_right_u16<4>(bytes), nibble);
    const Vi scale[2] = {widen_low(scales), widen_high(scales)};
    const Vi mid[2] = {widen_low(mids), widen_high(mids)};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const std::int16_t* indices = query.indices[row + r] + c;
      const Vi index[2] = {load_int(indices), load_int(indices + kBytes / 2)};
      store_halves(multiply_i16(index[0], scale[0]), multiply_i16(index[1], scale[1]),
                   query.high[row + r] + c, query.low[row + r] + c);
      scale_sums[r] = dot_i16(dot_i16(scale_sums[r], index[0], scale[0]), index[1], scale[1]);
      mid_sums[r] = dot_i16(dot_i16(mid_sums[r], index[0], mid[0]), index[1], mid[1]);
    }
  }
  const KeyUnits units = key_units(layout, tile);
  const Vf scale_factor = splat(-middle * units.scale);
  const Vf mid_factor = splat(units.mid);
  Vf sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sums[r] =
        multiply_add(to_float(scale_sums[r]), scale_factor, to_float(mid_sums[r]) * mid_factor);
  }
  const __m128 query_scales = _mm_load_ps(query.scales + row);
  const __m128 offset = _mm_load_ps(query.index_sums + row) *
                        _mm_set1_ps(static_cast<float>(kMaxMidIndex) * units.mid);
  _mm_store_ps(query.factors + row, query_scales * _mm_set1_ps(units.scale));
  _mm_store_ps(query.constants + row, query_scales * (reduce_add_each(sums) - offset));
}

template <int kBits>
inline void tile_scores(const TileLayout& layout, TilePair pair, int first, RowBlock& block,
                        PackedQuery& query) {
  for (int offset = layout.k_params_offset(); offset < layout.tile_bytes(); offset += 64) {
    prefetch(pair.next + offset);
  }
  for_row_groups(block.rows, [&]<int kRows>(int r) {
    fold_scales<kRows>(layout, pair.tile, 0.5f * static_cast<float>(max_code(kBits)), r, query);
  });
  for_row_groups(block.rows, [&]<int kRows>(int r) {
    dot_scores<kBits, kRows>(layout, pair, query, r, block.scores[r] + first);
  });
}

inline void packed_scores(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  for (int i = 0; i < tiles.count; ++i) {
    const TilePair pair{tiles.at[i], tiles.next[i]};
    if (tiles.layout.format.k_bits == 2) {
      tile_scores<2>(tiles.layout, pair, i * kTileTokens, block, query);
    } else {
      tile_scores<4>(tiles.layout, pair, i * kTileTokens, block, query);
    }
  }
}

// Weight times token scale of the step's positions, as 8 bits with one scale a row; and the sum of
// weight (mid / 64 - N / 2), which every channel gets.
template <int kBits>
inline void round_weights(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  const int count = tiles.count * kTileTokens;
  const Vf middle = splat(0.5f * static_cast<float>(max_code(kBits)));
  Vf scales[kStepTokens / kLanes];
  Vf lowest[kStepTokens / kLanes];
  for (int i = 0; i < count; i += kLanes) {
    const std::uint8_t* tile = tiles.at[i / kTileTokens] + i % kTileTokens;
    scales[i / kLanes] = scale_of(load_u8(tile + tiles.layout.v_scales_offset()), kVScaleOffset);
    lowest[i / kLanes] =
        to_float(load_i8(tile + tiles.layout.v_mids_offset())) * splat(kVMidUnit) - middle;
  }
  float most[kRowBlock];
  for (int r = 0; r < block.rows; ++r) {
    float* weights = block.scores[r];
    Vf highest = splat(0.0f);
    for (int i = 0; i < count; i += kLanes) {
      const Vf scaled = load(weights + i) * scales[i / kLanes];
      store(weights + i, scaled);
      highest = max(highest, scaled);
    }
    most[r] = reduce_max(highest);
  }
  for (int r = 0; r < block.rows; ++r) {
    const float* weights = block.scores[r];
    query.weight_scales[r] = most[r] * (1.0f / kMaxWeightIndex);
    const Vf inverse = splat(most[r] > 0.0f ? kMaxWeightIndex / most[r] : 0.0f);
    Vf offset = splat(0.0f);
    for (int i = 0; i < count; i += kLanes) {
      const Vi index = to_int(load(weights + i) * inverse);
      store_u8(query.weights[r] + i, index);
      offset = multiply_add(to_float(index), lowest[i / kLanes], offset);
    }
    store(block.offset[r],
          multiply_add(offset, splat(query.weight_scales[r]), load(block.offset[r])));
  }
}

template <int kBits>
inline void add_values(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  round_weights<kBits>(tiles, block, query);
  for_row_groups(block.rows, [&]<int kRows>(int r) {
    dot_values<kBits, kRows>(tiles, query, r, block.out_rotated[r]);
  });
}

inline void add_packed_values(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  if (tiles.layout.format.v_bits == 2) {
    add_values<2>(tiles, block, query);
  } else {
    add_values<4>(tiles, block, query);
  }
}

}  // namespace
}  // namespace oscar::cpu
