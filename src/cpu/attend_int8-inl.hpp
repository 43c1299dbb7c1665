// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Packed tiles with int8 dot products: what does not depend on how an instruction set multiplies
// bytes. attend_vnni-inl.hpp and attend_maddubs-inl.hpp have the two inner kernels, which end in
// the same integers.
//
// K, 2 bits: a query row is rounded once to int8, q_c = query_scale i_c with |i_c| <= 127. Codes go
// through a table of 16 bytes (four channels x four codes) that holds code s_c, at most 18, with
// s_c = key_scale_steps(i_s):
//   score = norm query_scale (U_s sum i_c (code s_c) - U_s N / 2 sum i_c s_c) + norm mids.
// K, 4 bits: the query's index has 12 bits and sign, and the scale of a tile's channel folds into
// it exactly: f_c = i_c s_c (at most 32634) = 256 hi + lo, two int8 operands for the codes
// themselves, U_s (256 hi . code + lo . code) in place of the first term. Rounding q to int8
// changes a channel by about 0.8 %: little beside the error of 2-bit keys (18 %), not beside that
// of 4-bit keys. The mids' share, U_m q . i_m, has an index of q of its own, of 15 bits and sign:
// mids can be many times what the codes span, and it is a small part of the work. V: weight times
// token scale, rounded to 8 bits once a step of 128 tokens; the terms that do not depend on the
// channel use the same rounded weights, so their error does not grow with mid.
//
// With each line it reads, a kernel prefetches the same line of the next step: the few KB that a
// page holds of one KV head are too short a run for the hardware to get ahead. Bursts of prefetches
// at one place, or into L2 only, are slower.
#pragma once

#include "core/calls.hpp"

namespace oscar::cpu {
namespace {

inline constexpr float kMaxWeightIndex = 255.0f;
constexpr float max_query_index(int k_bits) { return k_bits == 2 ? 127.0f : 5439.0f; }
inline constexpr float kMaxMidQueryIndex = 32767.0f;
// Where f_c is cut into hi and lo, hi stays an int8, and 256 channels of mids in 32 bits.
static_assert(5439 * kMaxScaleSteps + 128 <= 32767);
static_assert(std::int64_t{32767} * 32 * kMaxHeadDim < std::int64_t{1} << 31);

// 16-bit indices of a query row, in blocks of kBytes channels in the order of widen_low and
// widen_high.
using WideIndices = std::int16_t[kMaxHeadDim];

struct PackedQuery {
  // i_c: by channel (2 bits), or wide (4 bits). Zeros behind.
  alignas(64) std::int8_t bytes[kRowBlock][kMaxHeadDim];
  alignas(64) WideIndices indices[kRowBlock];
  alignas(64) WideIndices mid_indices[kRowBlock];  // for the mids: i_c in finer steps
  alignas(16) float scales[kRowBlock];
  // Of a step's tiles: the tables of channels 4 d .. 4 d + 3 (2 bits).
  alignas(64) std::uint8_t tables[kStepTiles][kMaxHeadDim / 4][16];
  // query_scale U_s; U_m q . i_m - query_scale U_s N / 2 sum i_c s_c
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

// rint(q inverse) by channel, zeros behind.
inline void round_query(const float* q, int head_dim, float inverse, std::int16_t* indices) {
  for (int c = 0; c < head_dim; c += kLanes) {
    store_i16(indices + c, to_int(load(q + c) * splat(inverse)));
  }
  for (int c = head_dim; c < kMaxHeadDim; ++c) indices[c] = 0;
}

inline void store_wide(const std::int16_t* indices, WideIndices& wide) {
  for (int c = 0; c < kMaxHeadDim; c += kBytes) {
    for (int i = 0; i < kBytes; i += 16) {
      std::memcpy(wide + c + i / 2, indices + c + i, 16);
      std::memcpy(wide + c + i / 2 + kBytes / 2, indices + c + i + 8, 16);
    }
  }
}

inline void prepare_packed(const TileLayout& layout, RowBlock& block, PackedQuery& query) {
  const bool wide = layout.format.k_bits == 4;
  const float max_index = max_query_index(layout.format.k_bits);
  for (int r = 0; r < block.rows; ++r) {
    const float* q = block.q_rotated[r];
    Vf highest = splat(0.0f);
    Vf nan = splat(0.0f);  // integers have no NaN: it goes into the scale
    for (int c = 0; c < layout.head_dim; c += kLanes) {
      highest = max(abs(load(q + c)), highest);
      nan = nan + load(q + c) * splat(0.0f);
    }
    const float most = reduce_max(highest);
    query.scales[r] = most / max_index + reduce_add(nan);
    std::int16_t indices[kMaxHeadDim];
    round_query(q, layout.head_dim, most > 0.0f ? kMaxMidQueryIndex / most : 0.0f, indices);
    store_wide(indices, query.mid_indices[r]);
    round_query(q, layout.head_dim, most > 0.0f ? max_index / most : 0.0f, indices);
    if (wide) {
      store_wide(indices, query.indices[r]);
      continue;
    }
    for (int c = 0; c < kMaxHeadDim; ++c) {
      query.bytes[r][c] = static_cast<std::int8_t>(indices[c]);
    }
  }
  for (int r = block.rows; r % 4 != 0; ++r) query.scales[r] = 0.0f;
}

// s_c and i_m of kBytes channels.
struct KeyBytes {
  Vi steps;    // bytes
  Vi mids[2];  // 16 bits, by widen_low and widen_high
};

struct StepTable {
  alignas(16) std::uint8_t at[16];
};
inline constexpr StepTable kSteps = [] {
  StepTable table{};
  for (int i = 0; i <= kMaxScaleIndex; ++i) {
    table.at[i] = static_cast<std::uint8_t>(key_scale_steps(i));
  }
  return table;
}();

inline KeyBytes key_bytes(const std::uint8_t* params) {
  const Vi bytes = load_int(params);
  const Vi index = and_int(shift_right_u16<kScaleShift>(bytes), splat_i8(kMaxScaleIndex));
  const Vi mids = and_int(bytes, splat_i8(kMidMask));
  const Vi offset = splat_i16(-kMaxMidIndex);
  return {shuffle_bytes(splat_16_bytes(kSteps.at), index),
          {add_i16(widen_low(mids), offset), add_i16(widen_high(mids), offset)}};
}

// sum + q . i_m, for the index of q that the mids have.
inline Vi dot_mids(Vi sum, const std::int16_t* indices, const KeyBytes& keys) {
  sum = dot_i16(sum, load_int(indices), keys.mids[0]);
  return dot_i16(sum, load_int(indices + kBytes / 2), keys.mids[1]);
}

// From sum i_c s_c and q . i_m in steps of the mids' index, as lanes to be added.
template <int kBits, int kRows>
inline void store_constants(const TileLayout& layout, const TilePair& pair,
                            const Vi (&scale_sums)[kRows], const Vi (&mid_sums)[kRows], int row,
                            PackedQuery& query) {
  constexpr float kMiddle = 0.5f * static_cast<float>(max_code(kBits));
  constexpr float kMidStep = max_query_index(kBits) / kMaxMidQueryIndex;  // of query_scale
  const KeyUnits units = key_units(layout, pair.tile);
  const Vf scale_factor = splat(-kMiddle * units.scale);
  const Vf mid_factor = splat(kMidStep * units.mid);
  Vf sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sums[r] =
        multiply_add(to_float(scale_sums[r]), scale_factor, to_float(mid_sums[r]) * mid_factor);
  }
  const V4 query_scales = load4(query.scales + row);
  store4(query.factors[pair.index] + row, query_scales * splat4(units.scale));
  store4(query.constants[pair.index] + row, query_scales * reduce_add_each(sums));
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
  Vi scale_sums[kRows];
  Vi mid_sums[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) scale_sums[r] = mid_sums[r] = splat_int(0);
  for (int c = 0; c < layout.head_dim; c += kBytes) {
    // Past head_dim: bytes of the next section, times query indices of 0.
    const KeyBytes keys = key_bytes(params + c);
    const Vi scale[2] = {widen_low(keys.steps), widen_high(keys.steps)};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const std::int16_t* indices = query.indices[row + r] + c;
      const Vi index[2] = {load_int(indices), load_int(indices + kBytes / 2)};
      store_halves(multiply_i16(index[0], scale[0]), multiply_i16(index[1], scale[1]),
                   query.high[row + r] + c, query.low[row + r] + c);
      scale_sums[r] = dot_i16(dot_i16(scale_sums[r], index[0], scale[0]), index[1], scale[1]);
      mid_sums[r] = dot_mids(mid_sums[r], query.mid_indices[row + r] + c, keys);
    }
  }
  store_constants<4>(layout, pair, scale_sums, mid_sums, row, query);
}

// Bytes of the four tables of a line, the same for every line. Plane i of a K word leaves its code
// in bits 2 (i % 2) of a byte once planes 2 and 3 are shifted down by four; the other two bits of
// the table index say which byte b of the word it is: 4 b + code for even planes, 4 code + b for
// odd ones.
struct TableBytes {
  alignas(64) std::uint8_t channel[64];  // of the line: 4 plane + b
  alignas(64) std::uint8_t code[64];
  alignas(16) std::uint8_t products[16];  // 4 i_s + code: code s_c
};
inline constexpr TableBytes kTableBytes = [] {
  TableBytes bytes{};
  for (int at = 0; at < 64; ++at) {
    const int plane = at / 16;
    const int b = plane % 2 == 0 ? at % 16 / 4 : at % 4;
    bytes.channel[at] = static_cast<std::uint8_t>(4 * plane + b);
    bytes.code[at] = static_cast<std::uint8_t>(plane % 2 == 0 ? at % 4 : at % 16 / 4);
  }
  for (int at = 0; at < 16; ++at) {
    bytes.products[at] = static_cast<std::uint8_t>(key_scale_steps(at / 4) * (at % 4));
  }
  return bytes;
}();

// 2 bits: code s_c for every channel and code of one tile.
inline void fill_tables(const TileLayout& layout, const TilePair& pair, PackedQuery& query) {
  std::uint8_t* tables = query.tables[pair.index][0];
  const std::uint8_t* params = pair.tile + layout.k_params_offset();
  const Vi products = splat_16_bytes(kTableBytes.products);
  for (const std::uint8_t* end = params + layout.head_dim; params < end; params += 16) {
    // 4 i_s of 16 channels.
    const Vi rows = and_int(shift_right_u16<kScaleShift - 2>(splat_16_bytes(params)), splat_i8(12));
    for (int at = 0; at < 64; at += kBytes) {
      const Vi row = shuffle_bytes(rows, load_int(kTableBytes.channel + at));
      store_int(tables + at, shuffle_bytes(products, add_i8(row, load_int(kTableBytes.code + at))));
    }
    tables += 64;
  }
}

// 2 bits: factors and constants of rows row .. row + kRows - 1 for one tile.
template <int kRows>
inline void sum_params(const TileLayout& layout, const TilePair& pair, int row,
                       PackedQuery& query) {
  const std::uint8_t* params = pair.tile + layout.k_params_offset();
  Vi scale_sums[kRows];
  Vi mid_sums[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) scale_sums[r] = mid_sums[r] = splat_int(0);
  for (int c = 0; c < layout.head_dim; c += kBytes) {
    // Past head_dim: bytes of the next section, times query indices of 0.
    const KeyBytes keys = key_bytes(params + c);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      scale_sums[r] = dot_bytes(scale_sums[r], keys.steps, load_int(query.bytes[row + r] + c));
      mid_sums[r] = dot_mids(mid_sums[r], query.mid_indices[row + r] + c, keys);
    }
  }
  store_constants<2>(layout, pair, scale_sums, mid_sums, row, query);
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
