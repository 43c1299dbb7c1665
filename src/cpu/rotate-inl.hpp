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

// One level at distance h over `count` vectors, `stride` floats apart.
inline void hadamard_level(float* x, int count, int stride, int h) {
  for (int base = 0; base < count; base += 2 * h) {
    for (int k = base; k < base + h; ++k) {
      float* low = x + k * stride;
      float* high = low + h * stride;
      const Vf a = load(low);
      const Vf b = load(high);
      store(low, a + b);
      store(high, a - b);
    }
  }
}

// The levels at distances h and 2 h in one pass over memory.
inline void hadamard_two_levels(float* x, int count, int stride, int h) {
  for (int base = 0; base < count; base += 4 * h) {
    for (int k = base; k < base + h; ++k) {
      float* p = x + k * stride;
      const int step = h * stride;
      const Vf a = load(p);
      const Vf b = load(p + step);
      const Vf c = load(p + 2 * step);
      const Vf d = load(p + 3 * step);
      const Vf ab = a + b;
      const Vf a_b = a - b;
      const Vf cd = c + d;
      const Vf c_d = c - d;
      store(p, ab + cd);
      store(p + step, a_b + c_d);
      store(p + 2 * step, ab - cd);
      store(p + 3 * step, a_b - c_d);
    }
  }
}

// All levels over `count` vectors (a power of two).
inline void hadamard_vectors(float* x, int count, int stride) {
  int h = 1;
  for (; 4 * h <= count; h *= 4) hadamard_two_levels(x, count, stride, h);
  if (h < count) hadamard_level(x, count, stride, h);
}

// One row of head_dim channels; the signs and the balance are the caller's.
inline void hadamard_row(float* x, int head_dim) {
  const int block = hadamard_block(head_dim);
  const Vf norm = splat(hadamard_norm(block));
  for (int c = 0; c < head_dim; c += kLanes) store(x + c, butterflies_in_lanes(load(x + c)));
  for (int c = 0; c < head_dim; c += block) hadamard_vectors(x + c, block / kLanes, kLanes);
  for (int c = 0; c < head_dim; c += kLanes) store(x + c, load(x + c) * norm);
}

// Columns [head_dim][32 tokens].
inline void hadamard_columns(float* x, int head_dim) {
  const int block = hadamard_block(head_dim);
  const Vf norm = splat(hadamard_norm(block));
  for (int c = 0; c < head_dim; c += block) {
    for (int lane = 0; lane < kTileTokens; lane += kLanes) {
      hadamard_vectors(x + c * kTileTokens + lane, block, kTileTokens);
    }
  }
  for (int i = 0; i < head_dim * kTileTokens; i += kLanes) store(x + i, load(x + i) * norm);
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
