// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Packed tiles with int8 dot products: what does not depend on how an instruction set multiplies
// bytes. attend_vnni-inl.hpp and attend_maddubs-inl.hpp have the two inner kernels, which end in
// the same integers.
//
// K, 2 bits: a query row is rounded once to int8, q_c = query_scale i_c with |i_c| <= 127. Codes go
// through a table of 16 bytes (four channels x four codes) that holds code i_s, at most 45:
//   score = norm query_scale (U_s sum i_c (code i_s) - U_s N / 2 sum i_c i_s + U_m sum i_c i_m).
// K, 4 bits: the query's index has 11 bits and sign, and the scale index of a tile folds into it
// exactly: f_c = i_c i_s (at most 32625) = 256 hi + lo, two int8 operands for the codes themselves,
// U_s (256 hi . code + lo . code) in place of the first term. Rounding q to int8 changes a channel
// by about 0.8 %: little beside the error of 2-bit keys (18 %), not beside that of 4-bit keys. V:
// weight times token scale, rounded to 8 bits once a step of 128 tokens; the terms that do not
// depend on the channel use the same rounded weights, so their error does not grow with mid.
//
// With each line it reads, a kernel prefetches the same line of the next step: the few KB that a
// page holds of one KV head are too short a run for the hardware to get ahead. Bursts of prefetches
// at one place, or into L2 only, are slower.
#pragma once

#include "core/calls.hpp"

namespace oscar::cpu {
namespace {

inline constexpr float kMaxWeightIndex = 255.0f;
constexpr float max_query_index(int k_bits) { return k_bits == 2 ? 127.0f : 2175.0f; }

struct PackedQuery {
  // i_c: by channel (2 bits); in blocks of kBytes channels, in the order of widen_low and
  // widen_high (4 bits). Zeros behind.
  alignas(64) std::int8_t bytes[kRowBlock][kMaxHeadDim];
  alignas(64) std::int16_t indices[kRowBlock][kMaxHeadDim];
  alignas(16) float scales[kRowBlock];
  alignas(16) float index_sums[kRowBlock];  // sum i_c
  // Of a step's tiles: the tables of channels 4 d .. 4 d + 3 (2 bits).
  alignas(64) std::uint8_t tables[kStepTiles][kMaxHeadDim / 4][16];
  // query_scale U_s; query_scale (U_m sum i_c i_m - U_s N / 2 sum i_c i_s)
  alignas(16) float factors[kStepTiles][kRowBlock];
  alignas(16) float constants[kStepTiles][kRowBlock];
  // Of one tile: f_c = 256 high + low (4 bits).
  alignas(64) std::int8_t high[kRowBlock][kMaxHeadDim];
  alignas(64) std::int8_t low[kRowBlock][kMaxHeadDim];
  alignas(64) std::uint8_t weights[kRowBlock][kStepTokens];
  alignas(64) float weight_scales[kRowBlock];
};

// Tile `index` of a step, and the one whose lines are prefetched meanwhile.
struct TilePair {
  const std::uint8_t* tile;
  const std::uint8_t* next;
  int index;
};

// The kernels of the target.
// 2 bits: scores[r][position] for kRows rows, all positions of the step.
template <int kRows>
void dot_step(const PackedTiles& tiles, const PackedQuery& query, int row, float* scores);
// 4 bits: scores[r][position] for kRows rows, 32 positions.
template <int kRows>
void dot_folded(const TileLayout& layout, TilePair pair, const PackedQuery& query, int row,
                float* scores);
// out[r] += weight_scales[r] sum over the step of weights[r][position] code.
template <int kBits, int kRows>
void dot_values(const PackedTiles& tiles, const PackedQuery& query, int row, float* out);

inline void store_query_index(int k_bits, const std::int16_t (&indices)[kMaxHeadDim], int r,
                              PackedQuery& query) {
  for (int c = 0; c < kMaxHeadDim; c += kBytes) {
    if (k_bits == 2) {
      for (int i = 0; i < kBytes; ++i) {
        query.bytes[r][c + i] = static_cast<std::int8_t>(indices[c + i]);
      }
      continue;
    }
    for (int i = 0; i < kBytes; i += 16) {
      std::int16_t* target = query.indices[r] + c + i / 2;
      std::memcpy(target, indices + c + i, 16);
      std::memcpy(target + kBytes / 2, indices + c + i + 8, 16);
    }
  }
}

inline void prepare_packed(const TileLayout& layout, RowBlock& block, PackedQuery& query) {
  const float max_index = max_query_index(layout.format.k_bits);
  for (int r = 0; r < block.rows; ++r) {
    float* q = block.q_rotated[r];
    Vf highest = splat(0.0f);
    Vf nan = splat(0.0f);  // integers have no NaN: it goes into the scale
    for (int c = 0; c < layout.head_dim; c += kLanes) {
      highest = max(abs(load(q + c)), highest);
      nan = nan + load(q + c) * splat(0.0f);
    }
    const float most = reduce_max(highest);
    query.scales[r] = most / max_index + reduce_add(nan);
    const Vf inverse = splat(most > 0.0f ? max_index / most : 0.0f);
    alignas(64) std::int16_t indices[kMaxHeadDim] = {};
    Vf sum = splat(0.0f);
    for (int c = 0; c < layout.head_dim; c += kLanes) {
      const Vi index = to_int(load(q + c) * inverse);
      store_i16(indices + c, index);
      sum = sum + to_float(index);
    }
    query.index_sums[r] = reduce_add(sum);
    store_query_index(layout.format.k_bits, indices, r, query);
  }
  for (int r = block.rows; r % 4 != 0; ++r) query.scales[r] = query.index_sums[r] = 0.0f;
}

// From sum i_c i_s and sum i_c i_m (i_m with its offset of 7), as lanes to be added; `middle` is N
// / 2.
template <int kRows>
inline void store_constants(const TileLayout& layout, const TilePair& pair, float middle,
                            const Vi (&scale_sums)[kRows], const Vi (&mid_sums)[kRows], int row,
                            PackedQuery& query) {
  const KeyUnits units = key_units(layout, pair.tile);
  const Vf scale_factor = splat(-middle * units.scale);
  const Vf mid_factor = splat(units.mid);
  Vf sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sums[r] =
        multiply_add(to_float(scale_sums[r]), scale_factor, to_float(mid_sums[r]) * mid_factor);
  }
  const V4 query_scales = load4(query.scales + row);
  const V4 offset =
      load4(query.index_sums + row) * splat4(static_cast<float>(kMaxMidIndex) * units.mid);
  store4(query.factors[pair.index] + row, query_scales * splat4(units.scale));
  store4(query.constants[pair.index] + row, query_scales * (reduce_add_each(sums) - offset));
}

// v = 256 high + low with low in -128..127, as bytes; the order of widen_low and widen_high.
inline void store_halves(Vi a, Vi b, std::int8_t* high, std::int8_t* low) {
  const Vi half = splat_i16(128);
  const Vi byte = splat_i16(255);
  store_int(high,
            narrow_i8(shift_right_i16<8>(add_i16(a, half)), shift_right_i16<8>(add_i16(b, half))));
  store_int(low, narrow_u8(and_int(a, byte), and_int(b, byte)));
}

// 4 bits: the operands of rows row .. row + kRows - 1 for one tile.
template <int kRows>
inline void fold_scales(const TileLayout& layout, const TilePair& pair, int row,
                        PackedQuery& query) {
  const std::uint8_t* params = pair.tile + layout.k_params_offset();
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
  store_constants(layout, pair, 0.5f * static_cast<float>(max_code(4)), scale_sums, mid_sums, row,
                  query);
}

// Bytes of the four tables of a line, the same for every line. Plane i of a K word leaves its code
// in bits 2 (i % 2) of a byte once planes 2 and 3 are shifted down by four; the other two bits of
// the table index say which byte b of the word it is: 4 b + code for even planes, 4 code + b for
// odd ones.
struct TableBytes {
  alignas(64) std::uint8_t channel[64];  // of the line: 4 plane + b
  alignas(64) std::uint8_t once[64];     // 255 where code is odd
  alignas(64) std::uint8_t twice[64];    // 255 where code >= 2
};
inline constexpr TableBytes kTableBytes = [] {
  TableBytes bytes{};
  for (int at = 0; at < 64; ++at) {
    const int plane = at / 16;
    const int code = plane % 2 == 0 ? at % 4 : at % 16 / 4;
    const int b = plane % 2 == 0 ? at % 16 / 4 : at % 4;
    bytes.channel[at] = static_cast<std::uint8_t>(4 * plane + b);
    bytes.once[at] = code % 2 != 0 ? 255 : 0;
    bytes.twice[at] = code >= 2 ? 255 : 0;
  }
  return bytes;
}();

// 2 bits: code i_s for every channel and code of one tile.
inline void fill_tables(const TileLayout& layout, const TilePair& pair, PackedQuery& query) {
  std::uint8_t* tables = query.tables[pair.index][0];
  const std::uint8_t* params = pair.tile + layout.k_params_offset();
  const Vi nibble = splat_i8(15);
  for (const std::uint8_t* end = params + layout.head_dim; params < end; params += 16) {
    const Vi scales = and_int(splat_16_bytes(params), nibble);
    for (int at = 0; at < 64; at += kBytes) {
      const Vi scale = shuffle_bytes(scales, load_int(kTableBytes.channel + at));
      const Vi once = and_int(scale, load_int(kTableBytes.once + at));
      const Vi twice = and_int(add_i8(scale, scale), load_int(kTableBytes.twice + at));
      store_int(tables + at, add_i8(once, twice));
    }
    tables += 64;
  }
}

// 2 bits: factors and constants of rows row .. row + kRows - 1 for one tile.
template <int kRows>
inline void sum_params(const TileLayout& layout, const TilePair& pair, int row,
                       PackedQuery& query) {
  const std::uint8_t* params = pair.tile + layout.k_params_offset();
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
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vi index = load_int(query.bytes[row + r] + c);
      scale_sums[r] = dot_nibbles(scale_sums[r], scales, index);
      mid_sums[r] = dot_nibbles(mid_sums[r], mids, index);
    }
  }
  store_constants(layout, pair, 0.5f * static_cast<float>(max_code(2)), scale_sums, mid_sums, row,
                  query);
}

inline TilePair pair_of(const PackedTiles& tiles, int i) { return {tiles.at[i], tiles.next[i], i}; }

inline void prefetch_params(const TileLayout& layout, const std::uint8_t* tile) {
  for (int offset = layout.k_params_offset(); offset < layout.tile_bytes(); offset += 64) {
    prefetch(tile + offset);
  }
}

// The short sums of all tiles come before the long ones, so that their latencies overlap.
inline void table_scores(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  for (int i = 0; i < tiles.count; ++i) {
    const TilePair pair = pair_of(tiles, i);
    prefetch_params(tiles.layout, pair.next);
    fill_tables(tiles.layout, pair, query);
    for_row_groups(block.rows,
                   [&]<int kRows>(int r) { sum_params<kRows>(tiles.layout, pair, r, query); });
  }
  for_row_groups(block.rows,
                 [&]<int kRows>(int r) { dot_step<kRows>(tiles, query, r, block.scores[r]); });
}

inline void folded_scores(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  for (int i = 0; i < tiles.count; ++i) {
    const TilePair pair = pair_of(tiles, i);
    prefetch_params(tiles.layout, pair.next);
    for_row_groups(block.rows, [&]<int kRows>(int r) {
      fold_scales<kRows>(tiles.layout, pair, r, query);
      dot_folded<kRows>(tiles.layout, pair, query, r, block.scores[r] + i * kTileTokens);
    });
  }
}

inline void packed_scores(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  if (tiles.layout.format.k_bits == 2) {
    table_scores(tiles, block, query);
  } else {
    folded_scores(tiles, block, query);
  }
}

// What a step's weights meet: token scales, mid / 64 - N / 2 a position, the largest scale.
struct StepValues {
  Vf scales[kStepTokens / kLanes];
  Vf offsets[kStepTokens / kLanes];
  float max_scale;
};

template <int kBits>
inline StepValues step_values(const PackedTiles& tiles) {
  const Vf middle = splat(0.5f * static_cast<float>(max_code(kBits)));
  StepValues params;
  Vf highest = splat(0.0f);
  for (int i = 0; i < tiles.count * kTileTokens; i += kLanes) {
    const std::uint8_t* tile = tiles.at[i / kTileTokens] + i % kTileTokens;
    const Vf scale = scale_of(load_u8(tile + tiles.layout.v_scales_offset()), kVScaleOffset);
    const Vf mid = to_float(load_i8(tile + tiles.layout.v_mids_offset()));
    highest = max(highest, scale);
    params.scales[i / kLanes] = scale;
    params.offsets[i / kLanes] = mid * splat(kVMidUnit) - middle;
  }
  params.max_scale = reduce_max(highest);
  return params;
}

// Softmax of row r, and its weight times token scale as 8 bits; the sum of weight
// (mid / 64 - N / 2) is what every channel gets. weight_scales[r] * 255 bounds weight times scale.
inline void round_weights(const StepValues& params, int count, int r, RowBlock& block,
                          PackedQuery& query) {
  constexpr float kTiny = 1e-30f;
  const Vf origin = splat(origin_of(block, r));
  const float bound = query.weight_scales[r] * kMaxWeightIndex;
  const Vf inverse = splat(bound > kTiny ? kMaxWeightIndex / bound : 0.0f);
  Vf sum = load(block.sum[r]);
  Vf offset = splat(0.0f);
  for (int i = 0; i < count; i += kLanes) {
    const Vf weight = exp2_negative(load(block.scores[r] + i) - origin);
    sum = sum + weight;
    const Vi index = to_int(weight * (params.scales[i / kLanes] * inverse));
    store_u8(query.weights[r] + i, index);
    offset = multiply_add(to_float(index), params.offsets[i / kLanes], offset);
  }
  store(block.sum[r], sum);
  store(block.offset[r],
        multiply_add(offset, splat(query.weight_scales[r]), load(block.offset[r])));
}

template <int kBits>
inline void add_values(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  const int count = tiles.count * kTileTokens;
  const StepValues params = step_values<kBits>(tiles);
  // All maxima first: one row after the other would wait for each search across lanes.
  alignas(64) float highest[kRowBlock] = {};
  for (int r = 0; r < block.rows; ++r) {
    const float step_max = follow_max(block, r, count);
    highest[r] = step_max - origin_of(block, r);
  }
  for (int r = 0; r < block.rows; r += kLanes) {
    const Vf bound = exp2_negative(load(highest + r)) * splat(params.max_scale / kMaxWeightIndex);
    store(query.weight_scales + r, bound);
  }
  for (int r = 0; r < block.rows; ++r) round_weights(params, count, r, block, query);
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
