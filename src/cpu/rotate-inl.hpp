// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Signs, balance and the block-wise Hadamard transform, over rows (lanes are channels) and over
// columns (lanes are tokens). Only sums and differences of two values: the order of the levels
// fixes every bit, the order of the vectors does not matter.
#pragma once

#include "oscar/format.hpp"

namespace oscar::cpu {
namespace {

struct ChannelSigns {
  alignas(64) float at[kMaxHeadDim];
};
constexpr ChannelSigns make_channel_signs() {
  ChannelSigns signs{};
  for (int c = 0; c < kMaxHeadDim; ++c) signs.at[c] = channel_sign(c);
  return signs;
}
inline constexpr ChannelSigns kSigns = make_channel_signs();

// 1 / sqrt(block), correctly rounded.
inline float hadamard_norm(int block) {
  switch (block) {
    case 16:
      return 0.25f;
    case 32:
      return 0x1.6a09e6p-3f;
    case 64:
      return 0.125f;
    case 128:
      return 0x1.6a09e6p-4f;
    default:
      return 0.0625f;
  }
}

// Levels whose vectors stay in registers between them: half of the registers.
inline constexpr int kMostLevels = kLanes == 8 ? 3 : 4;

// kLevels levels from distance h on over `count` vectors, `stride` floats apart, then times factor.
template <int kLevels>
inline void hadamard_levels(float* x, int count, int stride, int h, Vf factor) {
  constexpr int kVectors = 1 << kLevels;
  for (int base = 0; base < count; base += kVectors * h) {
    for (int k = base; k < base + h; ++k) {
      Vf v[kVectors];
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) v[i] = load(x + (k + i * h) * stride);
#pragma GCC unroll 4
      for (int step = 1; step < kVectors; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) {
          if ((i & step) != 0) continue;
          const Vf low = v[i];
          v[i] = low + v[i + step];
          v[i + step] = low - v[i + step];
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) store(x + (k + i * h) * stride, v[i] * factor);
    }
  }
}

// All levels over `count` vectors (a power of two), then times norm.
inline void hadamard_vectors(float* x, int count, int stride, float norm) {
  int h = 1;
  for (; h << kMostLevels < count; h <<= kMostLevels) {
    hadamard_levels<kMostLevels>(x, count, stride, h, splat(1.0f));
  }
  switch (count / h) {
    case 1:
      return hadamard_levels<0>(x, count, stride, h, splat(norm));
    case 2:
      return hadamard_levels<1>(x, count, stride, h, splat(norm));
    case 4:
      return hadamard_levels<2>(x, count, stride, h, splat(norm));
    case 8:
      return hadamard_levels<3>(x, count, stride, h, splat(norm));
    default:
      return hadamard_levels<kMostLevels>(x, count, stride, h, splat(norm));
  }
}

// One row of head_dim channels; the signs and the balance are the caller's.
inline void hadamard_row(float* x, int head_dim) {
  const int block = hadamard_block(head_dim);
  for (int c = 0; c < head_dim; c += kLanes) store(x + c, butterflies_in_lanes(load(x + c)));
  for (int c = 0; c < head_dim; c += block) {
    hadamard_vectors(x + c, block / kLanes, kLanes, hadamard_norm(block));
  }
}

// Columns [head_dim][32 tokens].
inline void hadamard_columns(float* x, int head_dim) {
  const int block = hadamard_block(head_dim);
  for (int c = 0; c < head_dim; c += block) {
    for (int lane = 0; lane < kTileTokens; lane += kLanes) {
      hadamard_vectors(x + c * kTileTokens + lane, block, kTileTokens, hadamard_norm(block));
    }
  }
}

inline void multiply_signs(float* x, int head_dim) {
  for (int c = 0; c < head_dim; c += kLanes) store(x + c, load(x + c) * load(kSigns.at + c));
}

// [32 rows][kMaxHeadDim] -> [head_dim][32 rows], each channel times its factor.
inline void transpose_rows(const float* rows, int head_dim, const float* factors, float* columns) {
  for (int c = 0; c < head_dim; c += kLanes) {
    for (int t = 0; t < kTileTokens; t += kLanes) {
      Vf block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(rows + (t + i) * kMaxHeadDim + c);
      if (factors != nullptr) {
        const Vf factor = load(factors + c);
        for (int i = 0; i < kLanes; ++i) block[i] = block[i] * factor;
      }
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(columns + (c + i) * kTileTokens + t, block[i]);
    }
  }
}

}  // namespace
}  // namespace oscar::cpu
