// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Exact tokens whose rows, or the query, are of several dtypes or fp32: in tf32, which holds fp16
// and bf16 without rounding. Short rather than fast.
#pragma once

#include <cstdint>

#include "cuda/attend_exact.cuh"

namespace oscar::cuda {

template <class S>
struct ExactAny {
  __device__ static void load(const CudaAttendCall& call, const std::byte* row, DType type,
                              int channel, float (&x)[kChunk]) {
    if constexpr (!S::kWhole) {
#pragma unroll
      for (float& value : x) value = 0.0f;
      if (channel >= S::head_dim(call)) return;
    }
    load_chunk(row + channel * bytes_of(type), type, x);
  }

  __device__ static void fetch_values(const CudaAttendCall&, const Lane&, const ExactTokens&,
                                      const ExactTile<S>&) {}

  template <typename Meanwhile>
  __device__ static void score(const CudaAttendCall& call, const Lane& lane,
                               const ExactTokens& tokens,
                               const std::byte* const (&queries)[S::kBlocks],
                               float (&scores)[S::kBlocks][2][4], const Meanwhile& meanwhile) {
    meanwhile();
#pragma unroll 1
    for (int first = 0; first < S::kPad; first += 32) {
      const int channel = first + 8 * lane.c;
      float keys[4][kChunk];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = lane.g + 8 * i;
        load(call, tokens.keys[t], tokens.key_types[t], channel, keys[i]);
      }
#pragma unroll
      for (int n = 0; n < S::kBlocks; ++n) {
        float q[kChunk];
        load(call, queries[n], call.q.dtype, channel, q);
#pragma unroll
        for (int k = 0; k < kChunk; k += 2) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            mma_tf32(scores[n][half], to_tf32(keys[2 * half][k]), to_tf32(keys[2 * half + 1][k]),
                     to_tf32(keys[2 * half][k + 1]), to_tf32(keys[2 * half + 1][k + 1]),
                     to_tf32(q[k]), to_tf32(q[k + 1]));
          }
        }
      }
    }
  }

  __device__ static void add(const CudaAttendCall& call, const Lane& lane,
                             const ExactTokens& tokens, ExactTile<S>& tile,
                             const float (&exact)[S::kBlocks][2][4], ExactSums<S>& sums) {
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        tile.weights[8 * n + 2 * lane.c + i % 2][lane.g + 8 * (i / 2)] = exact[n][i / 4][i % 4];
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < kTileTokens; first += 8) {
#pragma unroll
      for (int set = 0; set < S::kPad / 64; ++set) {
        float values[2][kChunk];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int t = first + lane.c + 4 * j;
          load(call, tokens.values[t], tokens.value_types[t], 64 * set + 8 * lane.g, values[j]);
        }
#pragma unroll
        for (int n = 0; n < S::kBlocks; ++n) {
          const float* weights = &tile.weights[8 * n + lane.g][first + lane.c];
#pragma unroll
          for (int m = 0; m < kChunk; m += 2) {
            mma_tf32(sums.out[n][4 * set + m / 2], to_tf32(values[0][m]), to_tf32(values[0][m + 1]),
                     to_tf32(values[1][m]), to_tf32(values[1][m + 1]), to_tf32(weights[0]),
                     to_tf32(weights[4]));
          }
        }
      }
    }
  }
};

}  // namespace oscar::cuda
