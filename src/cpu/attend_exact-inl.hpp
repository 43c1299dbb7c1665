// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Scores and sums over 32 tokens that stand as floats: keys [head_dim][32], so that lanes are
// tokens, and values [32][stride], so that lanes are channels. No sum ever runs across lanes.
#pragma once

#include "oscar/format.hpp"

namespace oscar::cpu {
namespace {

// scores[r][t] = q[r] . keys[.][t] for kRows rows. `q` has rows of kMaxHeadDim floats.
template <int kRows>
inline void float_scores(const float* keys, int head_dim, const float* q, float* scores) {
  constexpr int kWide = kTileTokens / kLanes < 2 ? 1 : 2;
  for (int t = 0; t < kTileTokens; t += kWide * kLanes) {
    Vf sums[kRows][kWide] = {};
    for (int c = 0; c < head_dim; ++c) {
      Vf k[kWide];
      for (int w = 0; w < kWide; ++w) k[w] = load(keys + c * kTileTokens + t + w * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vf factor = splat(q[r * kMaxHeadDim + c]);
        for (int w = 0; w < kWide; ++w) sums[r][w] = multiply_add(factor, k[w], sums[r][w]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int w = 0; w < kWide; ++w) store(scores + r * kStepTokens + t + w * kLanes, sums[r][w]);
    }
  }
}

template <int kRows, int kWide>
inline void add_value_columns(const float* values, int stride, const float* weights, float* out) {
  Vf sums[kRows][kWide];
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < kWide; ++w) sums[r][w] = load(out + r * kMaxHeadDim + w * kLanes);
  }
  for (int t = 0; t < kTileTokens; ++t) {
    Vf v[kWide];
    for (int w = 0; w < kWide; ++w) v[w] = load(values + t * stride + w * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vf weight = splat(weights[r * kStepTokens + t]);
      for (int w = 0; w < kWide; ++w) sums[r][w] = multiply_add(weight, v[w], sums[r][w]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < kWide; ++w) store(out + r * kMaxHeadDim + w * kLanes, sums[r][w]);
  }
}

// out[r] += sum over 32 tokens of weights[r][t] values[t], `width` channels (a multiple of 16).
template <int kRows>
inline void add_float_values(const float* values, int stride, int width, const float* weights,
                             float* out) {
  int c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
    add_value_columns<kRows, 2>(values + c, stride, weights, out + c);
  }
  if (c < width) add_value_columns<kRows, 1>(values + c, stride, weights, out + c);
}

// Calls f.operator()<n>(r) for rows r .. r + n - 1, four at a time: kernels keep the sums of n rows
// in registers.
template <typename Function>
inline void for_row_groups(int rows, const Function& f) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) f.template operator()<4>(r);
  switch (rows - r) {
    case 3:
      f.template operator()<3>(r);
      break;
    case 2:
      f.template operator()<2>(r);
      break;
    case 1:
      f.template operator()<1>(r);
      break;
    default:
      break;
  }
}

// Up to 32 exact tokens in rising order, from anywhere.
struct ExactBlock {
  int count = 0;
  std::int64_t tokens[kTileTokens];
  const std::byte* keys[kTileTokens];
  const std::byte* values[kTileTokens];
  DType key_dtype[kTileTokens];
  DType value_dtype[kTileTokens];
};

inline void load_exact(const ExactBlock& exact, RowBlock& block) {
  alignas(64) float rows[kTileTokens * kMaxHeadDim];
  for (int t = 0; t < kTileTokens; ++t) {
    // Behind the last token its copy: any finite number will do, the weight is 0.
    const int i = t < exact.count ? t : exact.count - 1;
    load_floats(exact.keys[i], exact.key_dtype[i], block.head_dim, rows + t * kMaxHeadDim);
    load_floats(exact.values[i], exact.value_dtype[i], block.head_dim,
                block.values + t * kMaxHeadDim);
  }
  transpose_rows(rows, block.head_dim, nullptr, block.keys);
}

inline void hide_exact(const ExactBlock& exact, const RowView& view, std::int64_t sinks,
                       float* scores) {
  const std::int64_t first = exact.tokens[0];
  const std::int64_t last = exact.tokens[exact.count - 1];
  if (exact.count == kTileTokens && first >= view.first && last <= view.position &&
      first >= view.packed_end) {
    return;
  }
  for (int i = 0; i < kTileTokens; ++i) {
    const std::int64_t t = exact.tokens[i < exact.count ? i : 0];
    const bool seen = t >= view.first && t <= view.position && (t < sinks || t >= view.packed_end);
    if (!seen || i >= exact.count) scores[i] = -kInfinity;
  }
}

inline void attend_exact(const ExactBlock& exact, std::int64_t sinks, RowBlock& block) {
  load_exact(exact, block);
  for_row_groups(block.rows, [&]<int kRows>(int r) {
    float_scores<kRows>(block.keys, block.head_dim, block.q[r], block.scores[r]);
  });
  for (int r = 0; r < block.rows; ++r) {
    cap_scores(block, 0.0f, block.scores[r], kTileTokens);
    hide_exact(exact, block.views[r], sinks, block.scores[r]);
  }
  softmax_rows(block, kTileTokens);
  for_row_groups(block.rows, [&]<int kRows>(int r) {
    add_float_values<kRows>(block.values, kMaxHeadDim, block.head_dim, block.scores[r],
                            block.out[r]);
  });
}

}  // namespace
}  // namespace oscar::cpu
