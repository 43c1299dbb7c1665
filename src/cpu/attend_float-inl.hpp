// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Packed tiles with float arithmetic. K: the channel scales of the tile are folded into the query,
// so a code costs shift, and, convert and one multiply-add a row; V: the token scales are folded
// into the weights. Up to four rows share the codes in registers; more rows read them from a tile
// of floats.
#pragma once

#include "core/calls.hpp"

namespace oscar::cpu {
namespace {

struct PackedQuery {
  alignas(64) float folded[kRowBlock][kMaxHeadDim];  // q_c s_c of the tile at hand
  float constants[kRowBlock];                        // sum of q_c (mid_c - N / 2 s_c)
};

inline constexpr int kFusedRows = 4;

inline void prepare_packed(const TileLayout& /*layout*/, RowBlock& /*block*/,
                           PackedQuery& /*query*/) {}

// key_scale_steps of parameter bytes: 2.0 with the upper bit of the index added to its exponent and
// the lower one as the first of its mantissa.
inline Vf key_steps(Vi params) {
  constexpr std::int32_t kTwo = 0x40000000;
  return as_float(add_int(splat_int(kTwo), shift_left(shift_right(params, kScaleShift), 22)));
}

template <int kBits>
inline void fold_scales(const TileLayout& layout, const std::uint8_t* tile, const RowBlock& block,
                        PackedQuery& query) {
  const KeyUnits units = key_units(layout, tile);
  const Vf middle = splat(0.5f * static_cast<float>(max_code(kBits)) * units.scale);
  alignas(64) float scales[kMaxHeadDim];
  alignas(64) float lowest[kMaxHeadDim];  // value of code 0
  for (int c = 0; c < layout.head_dim; c += kLanes) {
    const Vi params = load_u8(tile + layout.k_params_offset() + c);
    const Vf steps = key_steps(params);
    const Vf i_m = to_float(subtract_int(params & splat_int(kMidMask), splat_int(kMaxMidIndex)));
    store(scales + c, steps * splat(units.scale));
    store(lowest + c, i_m * splat(units.mid) - steps * middle);
  }
  for (int r = 0; r < block.rows; ++r) {
    Vf constant = splat(0.0f);
    for (int c = 0; c < layout.head_dim; c += kLanes) {
      const Vf q = load(block.q_rotated[r] + c);
      store(query.folded[r] + c, q * load(scales + c));
      constant = multiply_add(q, load(lowest + c), constant);
    }
    query.constants[r] = reduce_add(constant);
  }
}

// Code k of the channels of each word, as float.
template <int kBits>
inline Vf code_at(Vi words, int k) {
  const Vi mask = splat_int(max_code(kBits));
  return to_float(shift_right(words, 8 * (k % 4) + kBits * (k / 4)) & mask);
}

// sums over channels of folded[r][c] code[c], 32 positions a tile.
template <int kBits, int kRows>
inline void fused_scores(const std::uint8_t* codes, int head_dim, const float* folded,
                         float* scores) {
  constexpr int kPerWord = 32 / kBits;
  constexpr int kWide = kTileTokens / kLanes < 2 ? 1 : 2;
  for (int p = 0; p < kTileTokens; p += kWide * kLanes) {
    Vf sums[kRows][kWide] = {};
    const std::uint8_t* line = codes + 4 * p;
    for (int c = 0; c < head_dim; c += kPerWord, line += 4 * kTileTokens) {
      Vi words[kWide];
      for (int w = 0; w < kWide; ++w) words[w] = load_int(line + 4 * w * kLanes);
#pragma GCC unroll 16
      for (int k = 0; k < kPerWord; ++k) {
        Vf code[kWide];
        for (int w = 0; w < kWide; ++w) code[w] = code_at<kBits>(words[w], k);
        for (int r = 0; r < kRows; ++r) {
          const Vf q = splat(folded[r * kMaxHeadDim + c + k]);
          for (int w = 0; w < kWide; ++w) sums[r][w] = multiply_add(q, code[w], sums[r][w]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int w = 0; w < kWide; ++w) store(scores + r * kStepTokens + p + w * kLanes, sums[r][w]);
    }
  }
}

template <int kBits>
inline void unpack_keys(const std::uint8_t* codes, int head_dim, float* keys) {
  constexpr int kPerWord = 32 / kBits;
  for (int c = 0; c < head_dim; c += kPerWord) {
    for (int p = 0; p < kTileTokens; p += kLanes) {
      const Vi words = load_int(codes + 4 * (c / kPerWord * kTileTokens + p));
#pragma GCC unroll 16
      for (int k = 0; k < kPerWord; ++k) {
        store(keys + (c + k) * kTileTokens + p, code_at<kBits>(words, k));
      }
    }
  }
}

template <int kBits>
inline void tile_scores(const TileLayout& layout, const std::uint8_t* tile, int first,
                        RowBlock& block, PackedQuery& query) {
  const std::uint8_t* codes = tile + layout.k_codes_offset();
  fold_scales<kBits>(layout, tile, block, query);
  if (block.rows <= kFusedRows) {
    for_row_groups(block.rows, [&]<int kRows>(int r) {
      fused_scores<kBits, kRows>(codes, layout.head_dim, query.folded[r], block.scores[r] + first);
    });
  } else {
    unpack_keys<kBits>(codes, layout.head_dim, block.keys);
    for_row_groups(block.rows, [&]<int kRows>(int r) {
      float_scores<kRows>(block.keys, layout.head_dim, query.folded[r], block.scores[r] + first);
    });
  }
  for (int p = 0; p < kTileTokens; p += kLanes) {
    const Vf norm = norms_of(tile + layout.k_norms_offset() + p);
    for (int r = 0; r < block.rows; ++r) {
      float* score = block.scores[r] + first + p;
      store(score, (load(score) + splat(query.constants[r])) * norm);
    }
  }
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

// Weights become weights times scale; what does not depend on the channel goes into block.offset.
template <int kBits>
inline void fold_values(const PackedTiles& tiles, RowBlock& block) {
  const Vf middle = splat(0.5f * static_cast<float>(max_code(kBits)));
  for (int i = 0; i < tiles.count; ++i) {
    for (int p = 0; p < kTileTokens; p += kLanes) {
      const std::uint8_t* tile = tiles.at[i];
      const Vf scale = scale_of(load_u8(tile + tiles.layout.v_scales_offset() + p), kVScaleOffset);
      const Vf mid = to_float(load_i8(tile + tiles.layout.v_mids_offset() + p));
      const Vf lowest = mid * splat(kVMidUnit) - middle;
      for (int r = 0; r < block.rows; ++r) {
        float* weight = block.scores[r] + i * kTileTokens + p;
        const Vf scaled = load(weight) * scale;
        store(weight, scaled);
        store(block.offset[r], multiply_add(scaled, lowest, load(block.offset[r])));
      }
    }
  }
}

// kWide groups from `group` on, all positions of the step. A vector may run past the group into
// words of the next quad or section: those lanes end in the padding of out_rotated.
template <int kBits, int kRows, int kWide>
inline void fused_values(const PackedTiles& tiles, int group, const float* weights, float* out) {
  const TileLayout& layout = tiles.layout;
  const int group_channels = layout.v_group_channels();
  const int padded = padded_group(layout);
  for (int j = 0; j < group_channels; j += kLanes) {
    float* target = out + group * padded + j;
    Vf sums[kRows][kWide];
    for (int r = 0; r < kRows; ++r) {
      for (int w = 0; w < kWide; ++w) sums[r][w] = load(target + r * kMaxHeadDim + w * padded);
    }
    for (int i = 0; i < tiles.count; ++i) {
      const std::uint8_t* codes = tiles.at[i] + layout.v_codes_offset() + 4 * j;
      const float* weight = weights + i * kTileTokens;
      for (int quad = 0; quad < kTileTokens / 4; ++quad, weight += 4) {
        const Vi words = shift_right(load_int(codes + 4 * quad * group_channels), kBits * group);
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
          Vf code[kWide];
          for (int w = 0; w < kWide; ++w) code[w] = code_at<kBits>(words, 4 * w + b);
          for (int r = 0; r < kRows; ++r) {
            const Vf p = splat(weight[r * kStepTokens + b]);
            for (int w = 0; w < kWide; ++w) sums[r][w] = multiply_add(p, code[w], sums[r][w]);
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int w = 0; w < kWide; ++w) store(target + r * kMaxHeadDim + w * padded, sums[r][w]);
    }
  }
}

// [32 positions][groups x padded] floats.
template <int kBits>
inline void unpack_values(const TileLayout& layout, const std::uint8_t* codes, float* values) {
  constexpr int kGroups = 8 / kBits;
  const int group_channels = layout.v_group_channels();
  const int padded = padded_group(layout);
  for (int quad = 0; quad < kTileTokens / 4; ++quad) {
    for (int j = 0; j < group_channels; j += kLanes) {
      const Vi words = load_int(codes + 4 * (quad * group_channels + j));
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
#pragma GCC unroll 4
        for (int i = 0; i < kGroups; ++i) {
          store(values + (4 * quad + b) * kMaxHeadDim + i * padded + j,
                code_at<kBits>(words, 4 * i + b));
        }
      }
    }
  }
}

template <int kBits>
inline void add_values(const PackedTiles& tiles, RowBlock& block) {
  constexpr int kGroups = 8 / kBits;
  const TileLayout& layout = tiles.layout;
  fold_values<kBits>(tiles, block);
  if (block.rows <= kFusedRows) {
    for_row_groups(block.rows, [&]<int kRows>(int r) {
      for (int group = 0; group < kGroups; group += 2) {
        fused_values<kBits, kRows, 2>(tiles, group, block.scores[r], block.out_rotated[r]);
      }
    });
    return;
  }
  for (int i = 0; i < tiles.count; ++i) {
    unpack_values<kBits>(layout, tiles.at[i] + layout.v_codes_offset(), block.values);
    for_row_groups(block.rows, [&]<int kRows>(int r) {
      add_float_values<kRows>(block.values, kMaxHeadDim, kGroups * padded_group(layout),
                              block.scores[r] + i * kTileTokens, block.out_rotated[r]);
    });
  }
}

inline void add_packed_values(const PackedTiles& tiles, RowBlock& block, PackedQuery& /*query*/) {
  softmax_rows(block, tiles.count * kTileTokens);
  if (tiles.layout.format.v_bits == 2) {
    add_values<2>(tiles, block);
  } else {
    add_values<4>(tiles, block);
  }
}

}  // namespace
}  // namespace oscar::cpu
