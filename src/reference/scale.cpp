// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Indices are rounded by comparing the mantissa with the boundaries between two steps: no
// logarithm, whose last bit would depend on the library.
#include "reference/scale.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "oscar/format.hpp"

namespace oscar::reference {
namespace {

constexpr int kStepsPerOctave = 8;

float exp2_float(double x) { return static_cast<float>(std::exp2(x)); }

// Steps an octave of log2(x), rounded, for x > 0. Subnormals count as 2^-127: below every clamp.
int log2_steps(float x, int steps) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const int exponent = static_cast<int>(bits >> 23) - 127;
  const auto mantissa = std::bit_cast<float>((bits & 0x7fffffu) | 0x3f800000u);
  int index = steps * exponent;
  for (int j = 1; j <= steps; ++j) {
    if (mantissa >= exp2_float((2 * j - 1) / (2.0 * steps))) ++index;
  }
  return index;
}

std::uint8_t clamp_index(int index) { return static_cast<std::uint8_t>(std::clamp(index, 1, 255)); }

double octaves(std::uint8_t index, int bias) {
  return static_cast<double>(index) / kStepsPerOctave - bias;
}

// In 16 lanes and then pairwise: the order of a vector unit, which every backend can keep.
float sum_of_squares(int head_dim, const float* y) {
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  for (int c = 0; c < head_dim; ++c) lanes[c % kLanes] += y[c] * y[c];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

}  // namespace

std::uint8_t norm_index(int head_dim, const float* y) {
  const float mean_square = sum_of_squares(head_dim, y) / static_cast<float>(head_dim);
  if (mean_square == 0.0f) return 0;
  // Half the steps: the norm is the square root.
  return clamp_index(kStepsPerOctave * kTokenNormBias +
                     log2_steps(mean_square, kStepsPerOctave / 2));
}

std::uint8_t value_scale_index(float scale) {
  if (scale == 0.0f) return 0;
  return clamp_index(kStepsPerOctave * kVScaleBias + log2_steps(scale, kStepsPerOctave));
}

float inverse_norm_of(std::uint8_t index) {
  return index == 0 ? 0.0f : exp2_float(-octaves(index, kTokenNormBias));
}
float stored_norm_of(std::uint8_t stored) {
  return stored == 0 ? 0.0f : exp2_float(octaves(stored, kNormBias));
}
float value_scale_of(std::uint8_t index) {
  return index == 0 ? 0.0f : exp2_float(octaves(index, kVScaleBias));
}
float inverse_value_scale_of(std::uint8_t index) {
  return index == 0 ? 0.0f : exp2_float(-octaves(index, kVScaleBias));
}

}  // namespace oscar::reference
