// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// From scores to weights, online and in base 2: weight = 2^(score + log2(V scale) - max).
//
// The weights of a group of packed tiles are 16-bit integers relative to the group's own maximum,
// so the largest is 65535; the group's sums then meet the running ones, which stand relative to the
// maximum of all groups so far. Exact tokens have one running maximum and weights in floating
// point.
#pragma once

#include <cstdint>

#include "cuda/attend_query.cuh"
#include "cuda/attend_shape.cuh"
#include "cuda/mma.cuh"

namespace oscar::cuda {

// Finite, so that a difference of two is never NaN, and below every score.
inline constexpr float kNothing = -1e30f;

// cap tanh(score / cap) in units of log2, from turn = 2 log2(e) / cap. tanh(x) = 1 - 2 / (1 +
// e^2x): tanh.approx is too coarse for a cap of 30 or 50.
__device__ inline float soft_capped(float score, float cap, float turn) {
  return cap - __fdividef(2.0f * cap, 1.0f + exp2_fast(turn * score));
}

// Over the lanes that share query columns.
__device__ inline float max_over_tokens(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

__device__ inline float max_over_lanes(float x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}
__device__ inline float sum_over_lanes(float x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

// One column's running maximum and the lanes' sums, into a partial result.
__device__ inline void store_softmax(const DecodePlan& plan, const Lane& lane, int head_dim,
                                     int column, float max, float sum, float* partial) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  if (lane.g == 0 && column < plan.slot_columns) {
    partial[plan.slot_columns * head_dim + column] = max;
    partial[plan.slot_columns * (head_dim + 1) + column] = sum;
  }
}

// Sums over the packed tokens of a segment, for the columns of a lane: weights relative to 2^max.
template <class S>
struct DecodeSoftmax {
  float max[S::kLaneColumns];
  float sum[S::kLaneColumns];

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < S::kLaneColumns; ++j) {
      max[j] = kNothing;
      sum[j] = 0.0f;
    }
  }
};

// What a group's integer sums and the sums so far are multiplied by before they meet.
template <class S>
struct GroupFactors {
  float added[S::kLaneColumns];
  float kept[S::kLaneColumns];

  [[nodiscard]] __device__ bool any_kept_less() const {
    bool less = false;
#pragma unroll
    for (const float factor : kept) less |= factor < 1.0f;
    return __any_sync(kFullWarp, less);
  }
};

// exponents[tile][column of the lane][i]: of token g + 8 i, -infinity where there is none.
template <class S>
using GroupExponents = float[kGroupTiles][S::kLaneColumns][4];

// Operand B of token quads 2 c and 2 c + 1 from the weights of tokens g + 8 i, integers in the low
// 16 bits: even MMA columns have their high bytes, odd ones the low bytes.
__device__ inline void transpose_weights(const std::uint32_t (&integers)[4],
                                         std::uint32_t (&weights)[2]) {
  const std::uint32_t first =
      transpose_8x8(__byte_perm(integers[0], integers[1], 0x4051));  // high, high, low, low
  const std::uint32_t second = transpose_8x8(__byte_perm(integers[2], integers[3], 0x4051));
  weights[0] = __byte_perm(first, second, 0x5410);
  weights[1] = __byte_perm(first, second, 0x7632);
}

inline constexpr float kMostWeight = 65535.0f;
inline constexpr float kMostWeightLog2 = 15.99997798605273f;

// The weights of a group; warp: what its tiles were unpacked to.
template <class S, bool kPlain>
__device__ inline void weigh_group(const Lane& lane, const char* warp, const GroupTiles& tiles,
                                   const GroupExponents<S>& exponents, DecodeSoftmax<S>& softmax,
                                   GroupFactors<S>& factors,
                                   std::uint32_t (&weights)[kGroupTiles][S::kLaneColumns][2]) {
  float reference[S::kLaneColumns], sums[S::kLaneColumns];
#pragma unroll
  for (int j = 0; j < S::kLaneColumns; ++j) {
    float most = kNothing;
#pragma unroll
    for (int t = 0; t < kGroupTiles; ++t) {
#pragma unroll
      for (const float x : exponents[t][j]) most = fmaxf(most, x);
    }
    most = max_over_tokens(most);
    const float raised = fmaxf(softmax.max[j], most);
    factors.kept[j] = exp2_fast(softmax.max[j] - raised);
    factors.added[j] = exp2_fast(most - raised) * (1.0f / kMostWeight);
    softmax.max[j] = raised;
    reference[j] = most - kMostWeightLog2;
    sums[j] = 0.0f;
  }
#pragma unroll
  for (int t = 0; t < kGroupTiles; ++t) {
    if (!kPlain && !tiles.has(t)) {
#pragma unroll
      for (int j = 0; j < S::kLaneColumns; ++j) weights[t][j][0] = weights[t][j][1] = 0;
      continue;
    }
    const float4 inverse = *reinterpret_cast<const float4*>(warp + t * S::kTileBytes +
                                                            S::kInverseScales + 16 * lane.g);
    const float inverses[4] = {inverse.x, inverse.y, inverse.z, inverse.w};
#pragma unroll
    for (int j = 0; j < S::kLaneColumns; ++j) {
      std::uint32_t integers[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = exp2_fast(exponents[t][j][i] - reference[j]);
        sums[j] = fmaf(weight, inverses[i], sums[j]);
        integers[i] = __float_as_uint(weight + 0x1p23f);
      }
      transpose_weights(integers, weights[t][j]);
    }
  }
#pragma unroll
  for (int j = 0; j < S::kLaneColumns; ++j) {
    softmax.sum[j] = fmaf(sums[j], factors.added[j], softmax.sum[j] * factors.kept[j]);
  }
}

// Of exact tokens, for the columns 2 c and 2 c + 1 of each block.
template <class S>
struct ExactSoftmax {
  float max[S::kBlocks][2];
  float sum[S::kBlocks][2];

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) {
      max[n][0] = max[n][1] = kNothing;
      sum[n][0] = sum[n][1] = 0.0f;
    }
  }
};

template <class S>
__device__ inline void cap_scores(float softcap, float (&scores)[S::kBlocks][4]) {
  const float cap = softcap * kLog2E;
  const float turn = __fdividef(2.0f * kLog2E, cap);
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
    for (float& score : scores[n]) score = soft_capped(score, cap, turn);
  }
}

// The factors by which sums must be scaled after `max` has been moved to these scores.
template <class S>
__device__ inline void raise_max(const float (&scores)[S::kBlocks][4], ExactSoftmax<S>& softmax,
                                 float (&factors)[S::kBlocks][2]) {
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float most = max_over_tokens(fmaxf(scores[n][j], scores[n][2 + j]));
      const float old = softmax.max[n][j];
      softmax.max[n][j] = fmaxf(old, most);
      factors[n][j] = exp2_fast(old - softmax.max[n][j]);
      softmax.sum[n][j] *= factors[n][j];
    }
  }
}

}  // namespace oscar::cuda
