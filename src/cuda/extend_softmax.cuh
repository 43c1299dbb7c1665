// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The running softmax of the extend kernels, on MMA accumulators: a lane holds, of each of its
// blocks of 16 rows, row lane / 4 and row lane / 4 + 8 of the 64 x N accumulators s[n][2 i + e],
// columns 8 n + 2 (lane % 4) + e.
#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "cuda/extend_exact.cuh"
#include "cuda/extend_fill.cuh"

namespace oscar::cuda {

// Exponents are raised by this, so that weights down to 2^-22 are normal fp16 numbers.
inline constexpr float kWeightShift = 8.0f;
inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// What the center adds to the packed scores of two rows, in units of log2. Wanted once, or for a
// soft cap once a unit: in memory, since registers are scarce.
struct RowCenters {
  volatile float of[2];
};

// Two rows (lane / 4, + 8) of a block of 16.
struct SoftmaxRows {
  float max[2] = {-INFINITY, -INFINITY};  // of the scores, in units of ln 2
  float sum[2] = {0.0f, 0.0f};            // this lane's columns only, times 2^kWeightShift
};

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Scores that a row may not see become -infinity.
template <int N>
__device__ inline void mask_scores(const Layout& layout, const RowBlock& block, bool packed,
                                   int first, int end, const int (&position)[2], float (&s)[N][4]) {
  const int within = 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * n + within + i % 2;
      const int p = position[i / 2];
      const bool seen =
          packed ? sees_packed(layout, block, p,
                               first + (column & ~31) + token_of_column(column & 31), end)
                 : sees_exact(layout, block, p, first + column, end);
      if (!seen) s[n][i] = -INFINITY;
    }
  }
}

// s * multiplier + center through the soft cap; the multiplier afterwards is kLog2e.
template <int N>
__device__ inline void cap_scores(float cap, const float (&multiplier)[2],
                                  const RowCenters& centers, float (&s)[N][4]) {
  const float over_cap = 2.0f / cap;  // the multiplier has log2 e in it
  const float factor[2] = {multiplier[0] * over_cap, multiplier[1] * over_cap};
  const float added[2] = {centers.of[0] * over_cap, centers.of[1] * over_cap};
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // tanh(x) = 1 - 2 / (e^2x + 1), exact to float32 rounding at the size of the cap.
      const float x = fmaf(s[n][i], factor[i / 2], added[i / 2]);
      const float capped = cap * (1.0f - __fdividef(2.0f, exp2_fast(x) + 1.0f));
      s[n][i] = s[n][i] == -INFINITY ? s[n][i] : capped;
    }
  }
}

// Scores to weights, in place. factor: what sums so far have to be multiplied by. True if any
// factor of the warp is not 1.
template <int N>
__device__ inline bool update_softmax(const float (&multiplier)[2], float (&s)[N][4],
                                      SoftmaxRows& rows, float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = fmaxf(s[0][2 * i], s[0][2 * i + 1]);
#pragma unroll
    for (int n = 1; n < N; ++n) top = fmaxf(top, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
    top *= multiplier[i];  // which is positive
    top = fmaxf(rows.max[i], quad_max(top));
    factor[i] = rows.max[i] == top ? 1.0f : exp2_fast(rows.max[i] - top);
    rows.max[i] = top;
    const float reference = top == -INFINITY ? 0.0f : top - kWeightShift;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[n][2 * i + e];
        x = exp2_fast(fmaf(x, multiplier[i], -reference));
        sum += x;
      }
    }
    rows.sum[i] = fmaf(rows.sum[i], factor[i], sum);
  }
  return __any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f) != 0;
}

// After the packed units of rows: their scores were without the center, unless it went through the
// soft cap. With it, the maximum is what differs.
__device__ inline void add_center(const AttendOptions& options, const RowCenters& centers,
                                  SoftmaxRows& rows) {
  if (options.softcap > 0.0f) return;
  rows.max[0] += centers.of[0];
  rows.max[1] += centers.of[1];
}

__device__ inline std::uint32_t pack_weights(float a, float b) {
  return as_bits(__floats2half2_rn(a, b));
}

}  // namespace oscar::cuda
