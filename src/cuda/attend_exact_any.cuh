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

  const std::byte* queries[S::kBlocks];  // the row of column g

  __device__ void load_query(const CudaAttendCall&, const Lane&, int,
                             const std::byte* const (&rows)[S::kBlocks]) {
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) queries[n] = rows[n];
  }
  __device__ void leave_query(const CudaAttendCall& call, const DecodePlan& plan,
                              const DecodeItem& item, const Lane& lane, RawQuery<S>* to) const {
    to[lane.index] = load_raw_query<S>(call, plan, item, lane);
  }
  __device__ static void stage(const CudaAttendCall&, const Lane&, int, const std::byte*,
                               const ExactTile<S>&) {}

  __device__ static DType type_of(const CudaAttendCall& call, const DecodeSequence& s, int part,
                                  int t, DType of_new) {
    const int index = min(kExactTokens * part + t, s.exact_tokens - 1);
    return exact_token(s, index) >= s.cached ? of_new : call.layout.exact_dtype;
  }

  // Scores of tokens g and g + 8, columns 2 c and 2 c + 1. row: as find_row gives them.
  __device__ void score(const CudaAttendCall& call, const DecodeSequence& s, const Lane& lane,
                        int part, const std::byte* row, const ExactTile<S>&,
                        float (&scores)[S::kBlocks][4]) const {
    const std::byte* rows[2];
    DType types[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows[i] = row_of_lane(row, lane.g + 8 * i);
      types[i] = type_of(call, s, part, lane.g + 8 * i, call.k_new.dtype);
    }
#pragma unroll 1
    for (int first = 0; first < S::kPad; first += 32) {
      const int channel = first + 8 * lane.c;
      float keys[2][kChunk];
#pragma unroll
      for (int i = 0; i < 2; ++i) load(call, rows[i], types[i], channel, keys[i]);
#pragma unroll
      for (int n = 0; n < S::kBlocks; ++n) {
        float q[kChunk];
        load(call, queries[n], call.q.dtype, channel, q);
#pragma unroll
        for (int k = 0; k < kChunk; k += 2) {
          mma_tf32(scores[n], to_tf32(keys[0][k]), to_tf32(keys[1][k]), to_tf32(keys[0][k + 1]),
                   to_tf32(keys[1][k + 1]), to_tf32(q[k]), to_tf32(q[k + 1]));
        }
      }
    }
  }

  // Channel of block h of a lane.
  __device__ static int channel(const Lane& lane, int h) {
    return 64 * (h / 8) + 8 * lane.g + h % 8;
  }

  __device__ static void add(const CudaAttendCall& call, const DecodeSequence& s, const Lane& lane,
                             int part, const std::byte* row, ExactTile<S>& tile,
                             const float (&exact)[S::kBlocks][4], ExactSums<S>& sums) {
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        tile.weights[8 * n + 2 * lane.c + i % 2][lane.g + 8 * (i / 2)] = exact[n][i];
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < kExactTokens; first += 8) {
      const std::byte* rows[2];
      DType types[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int t = first + lane.c + 4 * j;
        rows[j] = row_of_lane(row, kExactTokens + t);
        types[j] = type_of(call, s, part, t, call.v_new.dtype);
      }
#pragma unroll
      for (int set = 0; set < S::kPad / 64; ++set) {
        float values[2][kChunk];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          load(call, rows[j], types[j], 64 * set + 8 * lane.g, values[j]);
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
