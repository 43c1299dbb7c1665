// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The state of one row block and its online softmax, base 2: packed and exact tokens share the
// running maximum and the denominator, and are summed apart, the packed ones in the rotated basis.
#pragma once

#include <limits>

#include "core/plan.hpp"
#include "oscar/format.hpp"

namespace oscar::cpu {
namespace {

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What one row sees: tokens first .. position, of them packed all tokens sinks .. packed_end - 1.
struct RowView {
  std::int64_t position;
  std::int64_t first;
  std::int64_t packed_end;
};

struct RowBlock {
  int rows;
  int head_dim;
  float softcap;  // 0: scores come in units of log2; else in units of the cap
  RowView views[kRowBlock];
  alignas(64) float q[kRowBlock][kMaxHeadDim];
  alignas(64) float q_rotated[kRowBlock][kMaxHeadDim];
  // q_rotated . center: what every packed token's score has on top of its tile's (cap_scores,
  // add_center).
  float center[kRowBlock];
  alignas(64) float out[kRowBlock][kMaxHeadDim];
  // Channel i G + j of group i at i padded(G) + j, so that every group starts a vector.
  alignas(64) float out_rotated[kRowBlock][kMaxHeadDim];
  // Lanes whose sum is the denominator, and what every rotated channel gets on top.
  alignas(64) float sum[kRowBlock][kLanes];
  alignas(64) float offset[kRowBlock][kLanes];
  float max[kRowBlock];
  alignas(64) float scores[kRowBlock][kStepTokens];
  // One block of 32 tokens as floats: keys by channel, values by token.
  alignas(64) float keys[kMaxHeadDim * kTileTokens];
  alignas(64) float values[kTileTokens * kMaxHeadDim];
};

// 2^x for x <= 0, relative error below 2e-7; 0 below -126.5; NaN stays NaN.
inline Vf exp2_negative(Vf x) {
  x = max(splat(-127.0f), x);
  const Vf f = minus_nearest(x);
  Vf p = splat(0.0013276457f);
  p = multiply_add(p, f, splat(0.009675541f));
  p = multiply_add(p, f, splat(0.055507135f));
  p = multiply_add(p, f, splat(0.2402212f));
  p = multiply_add(p, f, splat(0.69314694f));
  p = multiply_add(p, f, splat(1.0000001f));
  return times_exp2(p, x, f);
}

// cap tanh(x) in units of log2, for scores already divided by the cap. The absolute error, about
// cap 1e-7, is what matters in an exponent.
inline Vf soft_cap(Vf x, float cap) {
  const Vf e = exp2_negative(abs(x) * splat(-2.0f * kLog2E));
  const Vf tanh = (splat(1.0f) - e) / (splat(1.0f) + e);
  const Vf sign = as_float(as_int(x) & splat_int(std::numeric_limits<std::int32_t>::min()));
  return as_float(as_int(tanh * splat(cap * kLog2E)) | as_int(sign));
}

// The cap, of scores that all lack `center`; nothing is done without a cap.
inline void cap_scores(const RowBlock& block, float center, float* scores, int count) {
  if (block.softcap <= 0.0f) return;
  for (int i = 0; i < count; i += kLanes) {
    store(scores + i, soft_cap(load(scores + i) + splat(center), block.softcap));
  }
}

// Without a cap all packed scores are short by the same: they are summed as they are, and once
// their tiles are done, before any exact token, the maximum is put right.
inline void add_center(RowBlock& block) {
  if (block.softcap > 0.0f) return;
  for (int r = 0; r < block.rows; ++r) block.max[r] += block.center[r];
}

inline void multiply(float* x, int count, float factor) {
  const Vf f = splat(factor);
  for (int i = 0; i < count; i += kLanes) store(x + i, load(x + i) * f);
}

inline void raise_max(RowBlock& block, int r, float max) {
  const float old = block.max[r];
  block.max[r] = max;
  if (old == -kInfinity) return;  // nothing summed yet
  alignas(64) float factor[kLanes];
  store(factor, exp2_negative(splat(old - max)));
  multiply(block.sum[r], kLanes, factor[0]);
  multiply(block.offset[r], kLanes, factor[0]);
  multiply(block.out[r], block.head_dim, factor[0]);
  multiply(block.out_rotated[r], kMaxHeadDim, factor[0]);
}

// The running maximum of row r after `count` scores, and the maximum of these alone.
inline float follow_max(RowBlock& block, int r, int count) {
  const float* scores = block.scores[r];
  Vf highest = load(scores);
  for (int i = kLanes; i < count; i += kLanes) highest = max(load(scores + i), highest);
  const float max_score = reduce_max(highest);
  if (max_score > block.max[r]) raise_max(block, r, max_score);
  return max_score;
}

// What scores of row r are taken relative to.
inline float origin_of(const RowBlock& block, int r) {
  return block.max[r] == -kInfinity ? 0.0f : block.max[r];
}

inline void exponentiate(RowBlock& block, int r, int count) {
  float* scores = block.scores[r];
  const Vf max = splat(origin_of(block, r));
  Vf sum = load(block.sum[r]);
  for (int i = 0; i < count; i += kLanes) {
    const Vf p = exp2_negative(load(scores + i) - max);
    store(scores + i, p);
    sum = sum + p;
  }
  store(block.sum[r], sum);
}

// Scores become weights relative to the running maxima. `count`: a multiple of 32. All maxima
// first: one row after the other would wait for each sum across lanes.
inline void softmax_rows(RowBlock& block, int count) {
  for (int r = 0; r < block.rows; ++r) follow_max(block, r, count);
  for (int r = 0; r < block.rows; ++r) exponentiate(block, r, count);
}

}  // namespace
}  // namespace oscar::cpu
