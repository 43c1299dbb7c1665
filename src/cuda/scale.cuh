// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Norms and scales as indices in eighths of an octave. An index is rounded by comparing the
// mantissa with the boundaries between two steps, as on the CPU: no logarithm.
#pragma once

#include <cstdint>

#include "oscar/format.hpp"

namespace oscar::cuda {

inline constexpr int kTokenNormOffset = 8 * kTokenNormBias;
inline constexpr int kVScaleOffset = 8 * kVScaleBias;

// Index of the root mean square from the mean square; half the steps, as the norm is the root.
// The boundaries are float(2^((2 j - 1) / 8)).
__device__ inline int norm_index(float mean_square) {
  if (mean_square == 0.0f) return 0;
  constexpr float kBounds[4] = {0x1.172b84p+0f, 0x1.4bfdaep+0f, 0x1.8ace54p+0f, 0x1.d5818ep+0f};
  const unsigned bits = __float_as_uint(mean_square);
  const float mantissa = __uint_as_float((bits & 0x7fffffu) | 0x3f800000u);
  int index = 4 * (static_cast<int>(bits >> 23) - 127) + kTokenNormOffset;
#pragma unroll
  for (const float bound : kBounds) index += mantissa >= bound ? 1 : 0;
  return min(max(index, 1), 255);
}

// The byte of a norm whose tile's largest index is `largest`, with its bit of the tile's units.
__device__ inline std::uint8_t norm_byte(int index, int largest, std::uint32_t units,
                                         int position) {
  const std::uint32_t stored = static_cast<std::uint32_t>(stored_norm(index, largest));
  return static_cast<std::uint8_t>(stored | (units >> position & 1u) << 7);
}

// Index of a V scale; the boundaries are float(2^((2 j - 1) / 16)).
__device__ inline int value_scale_index(float scale) {
  if (scale == 0.0f) return 0;
  constexpr float kBounds[8] = {0x1.0b5586p+0f, 0x1.2387a6p+0f, 0x1.3dea64p+0f, 0x1.5ab07ep+0f,
                                0x1.7a1148p+0f, 0x1.9c4918p+0f, 0x1.c199bep+0f, 0x1.ea4afap+0f};
  const unsigned bits = __float_as_uint(scale);
  const float mantissa = __uint_as_float((bits & 0x7fffffu) | 0x3f800000u);
  int index = 8 * (static_cast<int>(bits >> 23) - 127) + kVScaleOffset;
#pragma unroll
  for (const float bound : kBounds) index += mantissa >= bound ? 1 : 0;
  return min(max(index, 1), 255);
}

// float(2^(eighths / 8)).
__device__ inline float exp2_eighths(int eighths) {
  constexpr float kSteps[8] = {0x1.000000p+0f, 0x1.172b84p+0f, 0x1.306fe0p+0f, 0x1.4bfdaep+0f,
                               0x1.6a09e6p+0f, 0x1.8ace54p+0f, 0x1.ae89fap+0f, 0x1.d5818ep+0f};
  const int step = eighths & 7;
  float mantissa = kSteps[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) mantissa = step == i ? kSteps[i] : mantissa;
  return __uint_as_float(__float_as_uint(mantissa) + (static_cast<unsigned>(eighths >> 3) << 23));
}

// 2^((index - offset) / 8) and its inverse; 0 for index 0.
__device__ inline float scale_of(int index, int offset) {
  return index == 0 ? 0.0f : exp2_eighths(index - offset);
}
__device__ inline float inverse_scale_of(int index, int offset) {
  return index == 0 ? 0.0f : exp2_eighths(offset - index);
}

}  // namespace oscar::cuda
