// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Sign, balance and Hadamard transform of 16 tokens by one warp.
//
// Four bits of the channel number are transformed by the tensor cores: the A operand is the 16 x 16
// Hadamard matrix times the channels' factors, the B operand the 16-bit rows as they came. A lane
// (g = lane / 4, q = lane % 4) loads 16-byte pieces of two rows, channels 32 r + 8 q .. + 7, whose
// register pairs are B operands already (x: first or second pair). The other bits, x and r, are
// transformed by sums and differences in registers. A lane ends with four tokens b of quad q; which
// output channel stands in which row of A (g, m) is free, so each side takes the order in which it
// packs (kPairs: is m the lowest channel bit, so that neighbouring channels are in one lane):
//   kPairs: channel = m + 2 (g % 2) + 4 x + 8 (g / 2) + 32 r
//   else:   channel = g % 4 + 4 x + 8 (g / 4) + 16 m + 32 r
// Products with a factor of +-1 are exact; a balance factor is split into `kSplits` parts of the
// rows' dtype, 22 bits or more together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/page.cuh"
#include "oscar/format.hpp"

namespace oscar::cuda {

// 1 / sqrt(block), correctly rounded.
__host__ __device__ constexpr float hadamard_norm(int block) {
  return block == 16    ? 0.25f
         : block == 32  ? 0x1.6a09e6p-3f
         : block == 64  ? 0.125f
         : block == 128 ? 0x1.6a09e6p-4f
                        : 0.0625f;
}

// Factors are stored times this. fp16 has too small an exponent for the low parts of a small
// factor; bf16 can take the Hadamard norm along where it is a power of two.
template <typename T, int kHeadDim>
inline constexpr float kFactorScale = std::is_same_v<T, __half> ? 512.0f
                                      : kHeadDim == 128         ? 1.0f
                                                                : hadamard_norm(kHeadDim);
template <typename T>
inline constexpr int kBalanceSplits = std::is_same_v<T, __half> ? 2 : 3;

__device__ inline __nv_bfloat16 to_16(float x, __nv_bfloat16) { return __float2bfloat16_rn(x); }
__device__ inline __half to_16(float x, __half) { return __float2half_rn(x); }
__device__ inline float from_16(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float from_16(__half x) { return __half2float(x); }
__device__ inline std::uint32_t bits_16(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ inline std::uint32_t bits_16(__half x) { return __half_as_ushort(x); }

// Factors of two channels a word: [split][channel / 2], by `threads` threads, this one the
// `rank`-th.
template <typename T, int kHeadDim, int kSplits>
__device__ inline void make_factors(const float* balance, std::uint32_t* factors, int rank,
                                    int threads) {
  for (int pair = rank; pair < kHeadDim / 2; pair += threads) {
    float rest[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rest[i] = channel_sign(2 * pair + i);
      if (balance != nullptr) rest[i] /= balance[2 * pair + i];
      rest[i] *= kFactorScale<T, kHeadDim>;
    }
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      const T low = to_16(rest[0], T());
      const T high = to_16(rest[1], T());
      factors[split * kHeadDim / 2 + pair] = bits_16(low) | bits_16(high) << 16;
      rest[0] -= from_16(low);
      rest[1] -= from_16(high);
    }
  }
}

template <typename T>
__device__ inline void multiply_add(float (&c)[4], std::uint32_t a0, std::uint32_t a1,
                                    std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                    std::uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// Sign bits of this lane's A words, [m][k of the first or second register], two halves each: odd
// where output and input channel share an odd number of one bits among 0, 1, 3, 4.
template <bool kPairs>
__device__ inline void hadamard_signs(int lane, std::uint32_t (&signs)[2][2]) {
  const int g = lane / 4;
  const int q = lane % 4;  // input bits 3, 4; the register is bit 1, the half bit 0
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int out0 = kPairs ? m : g & 1;
    const int out1 = kPairs ? g & 1 : g >> 1 & 1;
    const int out3 = kPairs ? g >> 1 & 1 : g >> 2;
    const int out4 = kPairs ? g >> 2 : m;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int odd = (k & out1) ^ (q & out3 & 1) ^ (q >> 1 & out4);
      signs[m][k] = static_cast<std::uint32_t>(odd) << 15 | static_cast<std::uint32_t>(odd ^ out0)
                                                                << 31;
    }
  }
}

// The rotated values of a lane, [x + 2 r][b / 2][2 m + b % 2]; of one of the two blocks of eight
// tokens where another warp has the other one.
template <int kHeadDim, int kBlocks = 2>
using Rotated = float[kHeadDim / 16][kBlocks][4];

// One value of it.
template <int kHeadDim>
__device__ inline float& at(Rotated<kHeadDim>& y, int x, int m, int r, int b) {
  return y[x + 2 * r][b / 2][2 * m + b % 2];
}
template <int kHeadDim>
__device__ inline const float& at(const Rotated<kHeadDim>& y, int x, int m, int r, int b) {
  return y[x + 2 * r][b / 2][2 * m + b % 2];
}

// y before the multiplication with the norm. raw[t][r]: pieces of the row of column g of block t;
// factors: make_factors' words.
template <bool kPairs, typename T, int kHeadDim, int kSplits, int kBlocks>
__device__ inline void rotate_rows(const uint4 (&raw)[kBlocks][kHeadDim / 32],
                                   const std::uint32_t* factors, int lane,
                                   Rotated<kHeadDim, kBlocks>& y) {
  constexpr int kGroups = kHeadDim / 16;
  std::uint32_t signs[2][2];
  hadamard_signs<kPairs>(lane, signs);
#pragma unroll
  for (int r = 0; r < kHeadDim / 32; ++r) {
#pragma unroll
    for (int i = 0; i < 8 * kBlocks; ++i) (&y[2 * r][0][0])[i] = 0.0f;
#pragma unroll
    for (int split = kSplits - 1; split >= 0; --split) {  // the small parts first
      const uint4 factor =
          *reinterpret_cast<const uint4*>(factors + split * kHeadDim / 2 + 16 * r + 4 * (lane % 4));
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const std::uint32_t first = x == 0 ? factor.x : factor.z;
        const std::uint32_t second = x == 0 ? factor.y : factor.w;
#pragma unroll
        for (int t = 0; t < kBlocks; ++t) {
          const uint4& w = raw[t][r];
          multiply_add<T>(y[x + 2 * r][t], first ^ signs[0][0], first ^ signs[1][0],
                          second ^ signs[0][1], second ^ signs[1][1], x == 0 ? w.x : w.z,
                          x == 0 ? w.y : w.w);
        }
      }
    }
  }
#pragma unroll
  for (int distance = 1; distance < kGroups; distance *= 2) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if ((group & distance) != 0) continue;
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) {
        float& a = y[group][i / 4][i % 4];
        float& b = y[group + distance][i / 4][i % 4];
        const float sum = a + b;
        b = a - b;
        a = sum;
      }
    }
  }
}

}  // namespace oscar::cuda
