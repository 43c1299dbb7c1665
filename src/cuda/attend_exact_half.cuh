// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Exact tokens where query, ring and the call's rows are all fp16 or all bf16: operands of the
// tensor cores as they are in memory. Weights in bf16 are two terms, 16 bits together.
#pragma once

#include <cstdint>

#include "cuda/attend_exact.cuh"

namespace oscar::cuda {

template <class S, DType kType>
struct ExactHalf {
  __device__ static void mma(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                             std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
    if constexpr (kType == DType::kBF16) {
      mma_bf16(c, a0, a1, a2, a3, b0, b1);
    } else {
      mma_f16(c, a0, a1, a2, a3, b0, b1, c);
    }
  }

  __device__ static uint4 load(const CudaAttendCall& call, const std::byte* row, int channel) {
    if (!S::kWhole && channel >= S::head_dim(call)) return uint4{};
    return __ldcg(reinterpret_cast<const uint4*>(row + 2 * channel));
  }

  // V rows stand in shared memory behind the tile, their 16-byte chunks permuted (xor with twice
  // the lane group that reads the row): they come while the scores are computed.
  static constexpr int kRowBytes = 2 * S::kPad;
  static constexpr int kStaged = S::kExactTileBytes;
  static_assert(sizeof(ExactTile<S>) <= kStaged);
  __device__ static int staged(int t, int chunk) {
    return kStaged + t * kRowBytes + 16 * (chunk ^ 2 * (t / 2 % 4));
  }
  __device__ static void fetch_values(const CudaAttendCall& call, const Lane& lane,
                                      const ExactTokens& tokens, ExactTile<S>& tile) {
    const std::uint32_t shared = shared_address(&tile);
    const int chunks = S::head_dim(call) / 8;
#pragma unroll 2
    for (int i = lane.index; i < kTileTokens * S::kPad / 8; i += 32) {
      const int t = i / (S::kPad / 8);
      const int chunk = i % (S::kPad / 8);
      if (!S::kWhole && chunk >= chunks) continue;
      cp_async_16(shared + staged(t, chunk), tokens.values[t] + 16 * chunk);
    }
    cp_async_commit();
  }

  // A register of operand A is two channels of a token: k index and channel may be paired at will.
  // `meanwhile`: once, while the rows come.
  template <typename Meanwhile>
  __device__ static void score(const CudaAttendCall& call, const Lane& lane,
                               const ExactTokens& tokens,
                               const std::byte* const (&queries)[S::kBlocks],
                               float (&scores)[S::kBlocks][2][4], const Meanwhile& meanwhile) {
    constexpr int kSteps = S::kPad / 32;
    constexpr int kTogether = kSteps < 4 ? kSteps : 4;  // loads under way
#pragma unroll 1
    for (int first = 0; first < kSteps; first += kTogether) {
      uint4 keys[kTogether][4];
#pragma unroll
      for (int s = 0; s < kTogether; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          keys[s][i] = load(call, tokens.keys[lane.g + 8 * i], 32 * (first + s) + 8 * lane.c);
        }
      }
      uint4 query[kTogether][S::kBlocks];
#pragma unroll
      for (int s = 0; s < kTogether; ++s) {
#pragma unroll
        for (int n = 0; n < S::kBlocks; ++n) {
          query[s][n] = load(call, queries[n], 32 * (first + s) + 8 * lane.c);
        }
      }
      if (first == 0) meanwhile();
#pragma unroll
      for (int s = 0; s < kTogether; ++s) {
#pragma unroll
        for (int n = 0; n < S::kBlocks; ++n) {
          const uint4& q = query[s][n];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4& a = keys[s][2 * half];
            const uint4& b = keys[s][2 * half + 1];
            mma(scores[n][half], a.x, b.x, a.y, b.y, q.x, q.y);
            mma(scores[n][half], a.z, b.z, a.w, b.w, q.z, q.w);
          }
        }
      }
    }
  }

  struct Weights {
    std::uint32_t high[4];  // tokens 8 i + 2 c and + 1 of column g
    std::uint32_t low[4];

    __device__ void to_next() {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        high[i] = high[i + 2];
        low[i] = low[i + 2];
      }
    }
  };
  __device__ static Weights weights_of(const float (&exact)[2][4]) {
    Weights weights;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float a = exact[i / 2][i % 2 * 2];
      const float b = exact[i / 2][i % 2 * 2 + 1];
      if constexpr (kType == DType::kBF16) {
        const __nv_bfloat162 high = __floats2bfloat162_rn(a, b);
        const float2 back = __bfloat1622float2(high);
        const __nv_bfloat162 low = __floats2bfloat162_rn(a - back.x, b - back.y);
        weights.high[i] = transpose_8x8(reinterpret_cast<const std::uint32_t&>(high));
        weights.low[i] = transpose_8x8(reinterpret_cast<const std::uint32_t&>(low));
      } else {
        const __half2 pair = __floats2half2_rn(a, b);
        weights.high[i] = transpose_8x8(reinterpret_cast<const std::uint32_t&>(pair));
        weights.low[i] = 0;
      }
    }
    return weights;
  }

  // Tokens 16 step + 2 c, + 1, + 8 and + 9; operand A pairs the same channel of two tokens.
  __device__ static void add(const CudaAttendCall& call, const Lane& lane, const ExactTokens&,
                             const ExactTile<S>& tile, const float (&exact)[S::kBlocks][2][4],
                             ExactSums<S>& sums) {
    Weights weights[S::kBlocks];
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) weights[n] = weights_of(exact[n]);
    cp_async_wait<0>();
    __syncwarp();
#pragma unroll 1  // short code: it comes from memory, once
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int set = 0; set < S::kPad / 64; ++set) {
        uint4 rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = 16 * step + 2 * lane.c + i % 2 + 8 * (i / 2);
          rows[i] = uint4{};
          if (S::kWhole || 64 * set + 8 * lane.g < S::head_dim(call)) {
            rows[i] = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(&tile) +
                                                      staged(t, 8 * set + lane.g));
          }
        }
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const auto word = [&](int i) {
            return p == 0 ? rows[i].x : p == 1 ? rows[i].y : p == 2 ? rows[i].z : rows[i].w;
          };
          const std::uint32_t a0 = __byte_perm(word(0), word(1), 0x5410);
          const std::uint32_t a1 = __byte_perm(word(0), word(1), 0x7632);
          const std::uint32_t a2 = __byte_perm(word(2), word(3), 0x5410);
          const std::uint32_t a3 = __byte_perm(word(2), word(3), 0x7632);
#pragma unroll
          for (int n = 0; n < S::kBlocks; ++n) {
            float (&out)[4] = sums.out[n][4 * set + p];
            const Weights& w = weights[n];
            mma(out, a0, a1, a2, a3, w.high[0], w.high[1]);
            if constexpr (kType == DType::kBF16) mma(out, a0, a1, a2, a3, w.low[0], w.low[1]);
          }
        }
      }
#pragma unroll
      for (Weights& w : weights) w.to_next();
    }
  }
};

}  // namespace oscar::cuda
