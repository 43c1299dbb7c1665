// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Norms and scales as indices in eighths of an octave, and the units that share the norms' bytes.
// An index is rounded by comparing the mantissa with the boundaries between two steps: no
// logarithm, whose last bit would depend on the library.
#pragma once

#include "oscar/format.hpp"

namespace oscar::cpu {
namespace {

// float(2^(j / 8)) and, in between, the boundaries float(2^((2 j - 1) / 16)), j = 1..8.
alignas(32) inline constexpr float kEighths[8] = {0x1.000000p+0f, 0x1.172b84p+0f, 0x1.306fe0p+0f,
                                                  0x1.4bfdaep+0f, 0x1.6a09e6p+0f, 0x1.8ace54p+0f,
                                                  0x1.ae89fap+0f, 0x1.d5818ep+0f};
inline constexpr float kSixteenthBounds[8] = {0x1.0b5586p+0f, 0x1.2387a6p+0f, 0x1.3dea64p+0f,
                                              0x1.5ab07ep+0f, 0x1.7a1148p+0f, 0x1.9c4918p+0f,
                                              0x1.c199bep+0f, 0x1.ea4afap+0f};

inline constexpr int kNormOffset = 8 * kNormBias;
inline constexpr int kTokenNormOffset = 8 * kTokenNormBias;
inline constexpr int kVScaleOffset = 8 * kVScaleBias;

// round(steps log2 x) + offset in 1..255, or 0 for x = 0. The boundaries of `steps` an octave.
template <int kSteps>
inline std::uint8_t log2_index(float x, const float (&bounds)[kSteps], int offset) {
  if (x == 0.0f) return 0;
  const auto bits = __builtin_bit_cast(std::uint32_t, x);
  const auto mantissa = __builtin_bit_cast(float, (bits & 0x7fffffu) | 0x3f800000u);
  int index = kSteps * (static_cast<int>(bits >> 23) - 127) + offset;
  for (const float bound : bounds) index += mantissa >= bound ? 1 : 0;
  return static_cast<std::uint8_t>(index < 1 ? 1 : index > 255 ? 255 : index);
}

// 2^((u - offset) / 8) and its inverse; 0 for u = 0.
inline Vf scale_of(Vi u, int offset) {
  return zero_where_zero(u, exp2_eighths(add_int(u, splat_int(-offset)), kEighths));
}
inline Vf inverse_scale_of(Vi u, int offset) {
  return zero_where_zero(u, exp2_eighths(subtract_int(splat_int(offset), u), kEighths));
}

// Norms of kLanes positions from their bytes.
inline Vf norms_of(const std::uint8_t* bytes) {
  return scale_of(load_u8(bytes) & splat_int(kMaxNormIndex), kNormOffset);
}

inline float bf16_value(std::uint32_t bits) { return __builtin_bit_cast(float, bits << 16); }
// To nearest even; x is finite.
inline std::uint32_t bf16_bits(float x) {
  const auto bits = __builtin_bit_cast(std::uint32_t, x);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// Of a K parameter byte, the bits of the mid.
inline constexpr int kMidMask = (1 << kScaleShift) - 1;

// U_s and U_m of a tile, from the top bits of its norm bytes.
struct KeyUnits {
  float scale;
  float mid;
};
inline KeyUnits key_units(const TileLayout& layout, const std::uint8_t* tile) {
  const std::uint32_t bits = top_bits(tile + layout.k_norms_offset());
  return {bf16_value(bits & 0xffffu) * (1.0f / kMaxScaleSteps),
          bf16_value(bits >> 16) * (1.0f / kMaxMidIndex)};
}

// Norm bytes from the indices of 32 tokens and the largest scale and |mid|, both in bf16 already.
inline void store_norms(const std::uint8_t* indices, float max_scale, float max_mid,
                        std::uint8_t* bytes) {
  int largest = 0;
  for (int p = 0; p < kTileTokens; ++p) largest = indices[p] > largest ? indices[p] : largest;
  const float tile_norm =
      __builtin_bit_cast(float, static_cast<std::uint32_t>(norm_octave(largest) + 127) << 23);
  const std::uint32_t units = bf16_bits(max_scale * tile_norm) | bf16_bits(max_mid * tile_norm)
                                                                     << 16;
  for (int p = 0; p < kTileTokens; ++p) {
    const auto stored = static_cast<std::uint32_t>(stored_norm(indices[p], largest));
    bytes[p] = static_cast<std::uint8_t>(stored | (units >> p & 1u) << 7);
  }
}

// Norm indices of the 32 tokens of `columns` [head_dim][32], which become z = y / norm.
inline void scale_columns(float* columns, int head_dim, std::uint8_t* indices) {
  constexpr float kBounds[4] = {kEighths[1], kEighths[3], kEighths[5], kEighths[7]};
  constexpr int kSums = 16;
  for (int t = 0; t < kTileTokens; t += kLanes) {
    Vf sums[kSums];
    for (Vf& sum : sums) sum = splat(0.0f);
    for (int c = 0; c < head_dim; c += kSums) {
      for (int l = 0; l < kSums; ++l) {
        const Vf y = load(columns + (c + l) * kTileTokens + t);
        sums[l] = sums[l] + y * y;
      }
    }
    for (int half = kSums / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) sums[l] = sums[l] + sums[l + half];
    }
    alignas(64) float mean_squares[kLanes];
    store(mean_squares, sums[0] / splat(static_cast<float>(head_dim)));
    // Half the steps: the norm is the square root.
    for (int i = 0; i < kLanes; ++i)
      indices[t + i] = log2_index(mean_squares[i], kBounds, kTokenNormOffset);
    const Vf inverse = inverse_scale_of(load_u8(indices + t), kTokenNormOffset);
    for (int c = 0; c < head_dim; ++c) {
      float* y = columns + c * kTileTokens + t;
      store(y, load(y) * inverse);
    }
  }
}

}  // namespace
}  // namespace oscar::cpu
