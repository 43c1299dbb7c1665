// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Packed tiles with the int8 dot products of arm64 (SDOT, UDOT by element), four codes a lane and
// instruction. Both key widths take the 4-bit arithmetic of attend_int8-inl.hpp.
//
// K: signed. Query rows are rounded once, q_c = query_scale i_c with |i_c| <= 5439; the scales of a
// tile, s_c = key_scale_steps(i_s), fold exactly: f_c = i_c s_c (at most 32634) = 256 hi + lo, and
//   score = norm query_scale U_s (256 hi . code + lo . code - N / 2 sum f) + norm U_m q . i_m,
// with an index of q of its own for the mids, |i_c| <= 32767.
// V: unsigned. Weight times token scale, rounded to 8 bits once a step of 128 tokens; the terms
// that do not depend on the channel use the same rounded weights, so their error does not grow with
// mid.
//
// The four dwords of a query vector are the 16 channels of one line of 2-bit codes (two lines of
// 4-bit codes), those of a weight vector the positions of four quads: lane l goes with plane or
// quad l, and no operand is ever broadcast.
#pragma once

#include <utility>

#include "core/calls.hpp"

namespace oscar::cpu {
namespace {

inline constexpr float kMaxQueryIndex = 5439.0f;
inline constexpr float kMaxMidQueryIndex = 32767.0f;
// hi stays an int8, and 256 channels of mids in 32 bits.
static_assert(5439 * kMaxScaleSteps + 128 <= 32767);
static_assert(std::int64_t{32767} * 32 * kMaxHeadDim < std::int64_t{1} << 31);
inline constexpr float kMaxWeightIndex = 255.0f;
inline constexpr int kDotChannels = 16;   // of a query vector
inline constexpr int kDotPositions = 16;  // of a weight vector

struct PackedQuery {
  alignas(64) std::int16_t indices[kRowBlock][kMaxHeadDim];
  alignas(64) std::int16_t mid_indices[kRowBlock][kMaxHeadDim];
  float scales[kRowBlock];
  alignas(64) std::int8_t high[kRowBlock][kMaxHeadDim];
  alignas(64) std::int8_t low[kRowBlock][kMaxHeadDim];
  float factors[kRowBlock];    // query_scale U_s
  float constants[kRowBlock];  // U_m q . i_m - query_scale U_s N / 2 sum f
  alignas(64) std::uint8_t weights[kRowBlock][kStepTokens];
  float weight_scales[kRowBlock];
};

// Calls f.operator()<i>() for i = 0 .. kCount - 1: lanes and shifts are immediate operands.
template <int kCount, typename Function>
inline void for_constants(const Function& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

inline void prepare_packed(const TileLayout& layout, RowBlock& block, PackedQuery& query) {
  for (int r = 0; r < block.rows; ++r) {
    const float* q = block.q_rotated[r];
    Vf highest = splat(0.0f);
    Vf nan = splat(0.0f);  // integers have no NaN: it goes into the scale
    for (int c = 0; c < layout.head_dim; c += kLanes) {
      highest = max(abs(load(q + c)), highest);
      nan = nan + load(q + c) * splat(0.0f);
    }
    const float most = reduce_max(highest);
    query.scales[r] = most / kMaxQueryIndex + reduce_add(nan);
    const Vf inverse = splat(most > 0.0f ? kMaxQueryIndex / most : 0.0f);
    const Vf mid_inverse = splat(most > 0.0f ? kMaxMidQueryIndex / most : 0.0f);
    for (int c = 0; c < layout.head_dim; c += kLanes) {
      vst1_s16(query.indices[r] + c, vqmovn_s32(to_int(load(q + c) * inverse)));
      vst1_s16(query.mid_indices[r] + c, vqmovn_s32(to_int(load(q + c) * mid_inverse)));
    }
  }
}

template <int kRows>
inline void fold_rows(const std::uint8_t* params, const TileLayout& layout, int row,
                      PackedQuery& query, std::int32_t (&folded_sums)[kRowBlock],
                      std::int32_t (&mid_sums)[kRowBlock]) {
  const uint8x16_t steps = {key_scale_steps(0), key_scale_steps(1), key_scale_steps(2),
                            key_scale_steps(3)};
  int32x4_t folded[kRows];
  int32x4_t mids[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) folded[r] = mids[r] = vdupq_n_s32(0);
  for (int c = 0; c < layout.head_dim; c += kDotChannels) {
    const uint8x16_t bytes = vld1q_u8(params + c);
    const int8x16_t scale = vreinterpretq_s8_u8(vqtbl1q_u8(steps, vshrq_n_u8(bytes, kScaleShift)));
    const int8x16_t mid = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(kMidMask))),
                                   vdupq_n_s8(kMaxMidIndex));
    const int16x8_t scale_a = vmovl_s8(vget_low_s8(scale));
    const int16x8_t scale_b = vmovl_high_s8(scale);
    const int16x8_t mid_a = vmovl_s8(vget_low_s8(mid));
    const int16x8_t mid_b = vmovl_high_s8(mid);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int16x8_t index_a = vld1q_s16(query.indices[row + r] + c);
      const int16x8_t index_b = vld1q_s16(query.indices[row + r] + c + 8);
      const int16x8_t a = vmulq_s16(index_a, scale_a);
      const int16x8_t b = vmulq_s16(index_b, scale_b);
      // f = 256 hi + lo: hi rounds half up, so lo, the low byte, is signed, and |hi| <= 127.
      vst1q_s8(query.high[row + r] + c, vrshrn_high_n_s16(vrshrn_n_s16(a, 8), b, 8));
      vst1q_s8(query.low[row + r] + c, vuzp1q_s8(vreinterpretq_s8_s16(a), vreinterpretq_s8_s16(b)));
      folded[r] = vpadalq_s16(vpadalq_s16(folded[r], a), b);
      const int16x8_t mid_index_a = vld1q_s16(query.mid_indices[row + r] + c);
      const int16x8_t mid_index_b = vld1q_s16(query.mid_indices[row + r] + c + 8);
      mids[r] = vmlal_s16(mids[r], vget_low_s16(mid_index_a), vget_low_s16(mid_a));
      mids[r] = vmlal_high_s16(mids[r], mid_index_a, mid_a);
      mids[r] = vmlal_s16(mids[r], vget_low_s16(mid_index_b), vget_low_s16(mid_b));
      mids[r] = vmlal_high_s16(mids[r], mid_index_b, mid_b);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    folded_sums[row + r] = vaddvq_s32(folded[r]);
    mid_sums[row + r] = vaddvq_s32(mids[r]);
  }
}

template <int kBits>
inline void fold_scales(const TileLayout& layout, const std::uint8_t* tile, int rows,
                        PackedQuery& query) {
  const KeyUnits units = key_units(layout, tile);
  const float middle = 0.5f * static_cast<float>(max_code(kBits)) * units.scale;
  const float mid_unit = kMaxQueryIndex / kMaxMidQueryIndex * units.mid;
  std::int32_t folded[kRowBlock];
  std::int32_t mids[kRowBlock];
  for_row_groups(rows, [&]<int kRows>(int r) {
    fold_rows<kRows>(tile + layout.k_params_offset(), layout, r, query, folded, mids);
  });
  for (int r = 0; r < rows; ++r) {
    const float constant =
        static_cast<float>(mids[r]) * mid_unit - static_cast<float>(folded[r]) * middle;
    query.factors[r] = query.scales[r] * units.scale;
    query.constants[r] = query.scales[r] * constant;
  }
}

// The codes of one plane of every byte.
template <int kBits, int kPlane>
inline uint8x16_t code_bytes(uint8x16_t words) {
  constexpr int kShift = kBits * kPlane;
  if constexpr (kShift > 0) words = vshrq_n_u8(words, kShift);
  if constexpr (kShift + kBits < 8) words = vandq_u8(words, vdupq_n_u8(max_code(kBits)));
  return words;
}

// 32 positions of one tile, as many at a time as leave the sums in registers: of 32, hi and lo of
// two vectors and four rows take 16, the query vectors 8.
template <int kBits, int kRows>
inline void dot_scores(const std::uint8_t* codes, const Vf (&norms)[kTileTokens / kLanes],
                       int head_dim, const PackedQuery& query, int row, float* scores) {
  constexpr int kPlanes = 8 / kBits;
  constexpr int kWide = kRows == 1 ? 4 : 2;
  constexpr int kLineBytes = 4 * kTileTokens;
  for (int p = 0; p < kTileTokens; p += kWide * kLanes) {
    int32x4_t high_sums[kRows][kWide];
    int32x4_t low_sums[kRows][kWide];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) high_sums[r][w] = low_sums[r][w] = vdupq_n_s32(0);
    }
    const std::uint8_t* line = codes + 4 * p;
    for (int c = 0; c < head_dim; c += kDotChannels, line += 4 / kPlanes * kLineBytes) {
      int8x16_t high[kRows];
      int8x16_t low[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        high[r] = vld1q_s8(query.high[row + r] + c);
        low[r] = vld1q_s8(query.low[row + r] + c);
      }
      for_constants<4>([&]<int kLane>() {
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) {
          const uint8x16_t words = vld1q_u8(line + kLane / kPlanes * kLineBytes + 16 * w);
          const int8x16_t code = vreinterpretq_s8_u8(code_bytes<kBits, kLane % kPlanes>(words));
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            high_sums[r][w] = vdotq_laneq_s32(high_sums[r][w], code, high[r], kLane);
            low_sums[r][w] = vdotq_laneq_s32(low_sums[r][w], code, low[r], kLane);
          }
        }
      });
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vf factor = splat(query.factors[row + r]);
      const Vf constant = splat(query.constants[row + r]);
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) {
        const Vi dot = vaddq_s32(vshlq_n_s32(high_sums[r][w], 8), low_sums[r][w]);
        store(scores + r * kStepTokens + p + w * kLanes,
              multiply_add(to_float(dot), factor, constant) * norms[p / kLanes + w]);
      }
    }
  }
}

template <int kBits>
inline void tile_scores(const TileLayout& layout, const std::uint8_t* tile, int first,
                        RowBlock& block, PackedQuery& query) {
  fold_scales<kBits>(layout, tile, block.rows, query);
  Vf norms[kTileTokens / kLanes];
  for (int i = 0; i < kTileTokens / kLanes; ++i) {
    norms[i] = norms_of(tile + layout.k_norms_offset() + i * kLanes);
  }
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

// 8 floats, 0 to 255, as bytes.
inline uint8x8_t to_bytes(Vf a, Vf b) {
  return vqmovun_s16(vcombine_s16(vqmovn_s32(to_int(a)), vqmovn_s32(to_int(b))));
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
    for (int i = 0; i < count; i += 2 * kLanes) {
      vst1_u8(query.weights[r] + i,
              to_bytes(load(weights + i) * inverse, load(weights + i + kLanes) * inverse));
    }
  }
}

// sum of weight (mid / 64 - N / 2), which every channel gets. mid + 128 is unsigned like the
// weights.
template <int kBits>
inline void add_offsets(const PackedTiles& tiles, RowBlock& block, const PackedQuery& query) {
  constexpr int kMiddle = 128 + max_code(kBits) * 32;  // N / 2 in units of mid
  for (int r = 0; r < block.rows; ++r) {
    uint32x4_t mids = vdupq_n_u32(0);
    uint32x4_t sums = vdupq_n_u32(0);
    for (int i = 0; i < tiles.count; ++i) {
      const std::uint8_t* mid_bytes = tiles.at[i] + tiles.layout.v_mids_offset();
      for (int p = 0; p < kTileTokens; p += kDotPositions) {
        const uint8x16_t mid = veorq_u8(vld1q_u8(mid_bytes + p), vdupq_n_u8(128));
        const uint8x16_t weight = vld1q_u8(query.weights[r] + i * kTileTokens + p);
        mids = vdotq_u32(mids, weight, mid);
        sums = vdotq_u32(sums, weight, vdupq_n_u8(1));
      }
    }
    const Vi offset = vreinterpretq_s32_u32(vmlsq_u32(mids, sums, vdupq_n_u32(kMiddle)));
    const Vf factor = splat(query.weight_scales[r] * kVMidUnit);
    store(block.offset[r], multiply_add(to_float(offset), factor, load(block.offset[r])));
  }
}

// kWide vectors of channels from j on, of every group, over all positions of the step.
template <int kBits, int kRows, int kWide>
inline void value_columns(const PackedTiles& tiles, const PackedQuery& query, int row, int j,
                          float* out) {
  constexpr int kGroups = 8 / kBits;
  const int quad_bytes = 4 * tiles.layout.v_group_channels();
  uint32x4_t sums[kRows][kWide][kGroups];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int w = 0; w < kWide; ++w) {
#pragma GCC unroll 4
      for (int i = 0; i < kGroups; ++i) sums[r][w][i] = vdupq_n_u32(0);
    }
  }
  const std::uint8_t* weights = query.weights[row];
  // Not a loop over halves in a loop over tiles: unrolled, that does not fit the registers.
  for (int half = 0; half < 2 * tiles.count; ++half, weights += kDotPositions) {
    const std::uint8_t* codes =
        tiles.at[half / 2] + tiles.layout.v_codes_offset() + half % 2 * 4 * quad_bytes + 4 * j;
    uint8x16_t weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weight[r] = vld1q_u8(weights + r * kStepTokens);
    for_constants<4>([&]<int kLane>() {
#pragma GCC unroll 2
      for (int w = 0; w < kWide; ++w) {
        const uint8x16_t words = vld1q_u8(codes + kLane * quad_bytes + 16 * w);
        for_constants<kGroups>([&]<int kGroup>() {
          const uint8x16_t code = code_bytes<kBits, kGroup>(words);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            sums[r][w][kGroup] = vdotq_laneq_u32(sums[r][w][kGroup], code, weight[r], kLane);
          }
        });
      }
    });
  }
  const int padded = padded_group(tiles.layout);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Vf factor = splat(query.weight_scales[row + r]);
#pragma GCC unroll 2
    for (int w = 0; w < kWide; ++w) {
#pragma GCC unroll 4
      for (int i = 0; i < kGroups; ++i) {
        float* target = out + r * kMaxHeadDim + i * padded + j + w * kLanes;
        store(target, multiply_add(vcvtq_f32_u32(sums[r][w][i]), factor, load(target)));
      }
    }
  }
}

// A group is a multiple of four channels: no vector runs past it.
template <int kBits, int kRows>
inline void dot_values(const PackedTiles& tiles, const PackedQuery& query, int row, float* out) {
  constexpr int kWide = kRows * (8 / kBits) < 8 ? 2 : 1;
  const int group_channels = tiles.layout.v_group_channels();
  int j = 0;
  for (; j + kWide * kLanes <= group_channels; j += kWide * kLanes) {
    value_columns<kBits, kRows, kWide>(tiles, query, row, j, out);
  }
  if (j < group_channels) value_columns<kBits, kRows, 1>(tiles, query, row, j, out);
}

template <int kBits>
inline void add_values(const PackedTiles& tiles, RowBlock& block, const PackedQuery& query) {
  add_offsets<kBits>(tiles, block, query);
  for_row_groups(block.rows, [&]<int kRows>(int r) {
    dot_values<kBits, kRows>(tiles, query, r, block.out_rotated[r]);
  });
}

inline void add_packed_values(const PackedTiles& tiles, RowBlock& block, PackedQuery& query) {
  softmax_rows(block, tiles.count * kTileTokens);
  round_weights(tiles, block, query);
  if (tiles.layout.format.v_bits == 2) {
    add_values<2>(tiles, block, query);
  } else {
    add_values<4>(tiles, block, query);
  }
}

}  // namespace
}  // namespace oscar::cpu
