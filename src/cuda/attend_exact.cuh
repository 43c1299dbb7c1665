// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// 32 exact tokens (sinks, ring, the call's own rows) of an item, in the original basis: what both
// ways to multiply them share (attend_exact_half.cuh, attend_exact_any.cuh).
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/attend_query.cuh"
#include "cuda/attend_shape.cuh"
#include "cuda/mma.cuh"
#include "cuda/page.cuh"
#include "cuda/softmax.cuh"

namespace oscar::cuda {

// In the shared memory of a warp: where the tokens' rows are, and the weights.
template <class S>
struct ExactTile {
  const std::byte* keys[kTileTokens];
  const std::byte* values[kTileTokens];
  int tokens[kTileTokens];  // -1: none, and the rows of some other token
  DType key_types[kTileTokens];
  DType value_types[kTileTokens];
  int4 bounds[8 * S::kBlocks];  // of a column: first token, last token, end of the packed ones
  float weights[8 * S::kBlocks][kTileTokens + 4];
};

// What the query of each column reads exactly: tokens x to y, but from z on where it is no sink.
template <class S>
__device__ inline void set_exact_bounds(const CudaAttendCall& call, const DecodePlan& plan,
                                        const DecodeItem& item, const Lane& lane,
                                        ExactTile<S>& tile) {
  if (lane.index >= 8 * S::kBlocks) return;
  const DecodeColumn at = column_of(plan, item, lane.index);
  const int position = item.sequence.cached + at.query;
  tile.bounds[lane.index] =
      at.used ? make_int4(first_token(call, position), position,
                          kTileTokens * packed_tiles_of(call, plan, item.sequence, at.query), 0)
              : make_int4(INT_MAX, 0, 0, 0);
}

// Half block h of a lane: channel 64 (h / 8) + 8 g + h % 8.
template <class S>
struct ExactSums {
  float out[S::kBlocks][S::kPad / 16][4];

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
      for (int r = 0; r < S::kPad / 16; ++r) {
        out[n][r][0] = out[n][r][1] = out[n][r][2] = out[n][r][3] = 0.0f;
      }
    }
  }
};

// Where the K and the V row of an exact token are.
struct ExactRows {
  const std::byte* key;
  const std::byte* value;
  DType key_type;
  DType value_type;
};
__device__ inline ExactRows exact_rows(const CudaAttendCall& call, const DecodeItem& item,
                                       int token) {
  const DecodeSequence& s = item.sequence;
  const Layout& layout = call.layout;
  if (token >= s.cached) {
    const int row = s.first_row + token - s.cached;
    return {row_address(call.k_new, row, item.kv_head), row_address(call.v_new, row, item.kv_head),
            call.k_new.dtype, call.v_new.dtype};
  }
  const int row = token < layout.sinks ? sink_row(layout, token) : ring_row(layout, token);
  const auto address = [&](Side side) {
    return exact_address(layout, call.cache, s.b, s.slot, side, item.kv_head, row);
  };
  return {address(Side::kKey), address(Side::kValue), layout.exact_dtype, layout.exact_dtype};
}

// Token `index` of the exact ones.
__device__ inline int exact_token(const DecodeSequence& s, int index) {
  return index < s.sinks ? index : s.exact_first + index - s.sinks;
}

__device__ inline void prefetch_row(const std::byte* row, int bytes) {
  for (int at = 0; at < bytes; at += 128) prefetch_l2(row + at);
}

// The rows of exact token `index` on their way to L2: under load each wait for memory is one for
// all the tiles that were asked for before.
__device__ inline void prefetch_exact(const CudaAttendCall& call, const DecodeItem& item,
                                      int index) {
  if (index >= item.sequence.exact_tokens) return;
  const ExactRows rows = exact_rows(call, item, exact_token(item.sequence, index));
  prefetch_row(rows.key, call.layout.head_dim * bytes_of(rows.key_type));
  prefetch_row(rows.value, call.layout.head_dim * bytes_of(rows.value_type));
}

// Lane t: the rows of exact token 32 unit + t.
template <class S>
__device__ inline void find_rows(const CudaAttendCall& call, const DecodeItem& item, int unit,
                                 int t, ExactTile<S>& tile) {
  const DecodeSequence& s = item.sequence;
  const int index = min(kTileTokens * unit + t, s.exact_tokens - 1);
  const int token = exact_token(s, index);
  const ExactRows rows = exact_rows(call, item, token);
  tile.tokens[t] = index == kTileTokens * unit + t ? token : -1;
  tile.keys[t] = rows.key;
  tile.values[t] = rows.value;
  tile.key_types[t] = rows.key_type;
  tile.value_types[t] = rows.value_type;
}

// Scores in units of log2, -infinity where the column does not read the token exactly.
template <class S>
__device__ inline void finish_exact_scores(const CudaAttendCall& call, const Lane& lane,
                                           const ExactTile<S>& tile,
                                           float (&scores)[S::kBlocks][2][4]) {
  const float scale = call.options.scale * kLog2E;
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[n][i / 4][i % 4] *= scale;
  }
  if (call.options.softcap > 0.0f) cap_scores<S>(call.options.softcap, scores);
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int4 bound = tile.bounds[8 * n + 2 * lane.c + j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = tile.tokens[lane.g + 8 * i];
        const bool seen =
            token >= bound.x && token <= bound.y && (token < call.layout.sinks || token >= bound.z);
        if (!seen) scores[n][i / 2][i % 2 * 2 + j] = -INFINITY;
      }
    }
  }
}

template <class S>
__device__ inline void weigh_exact(const float (&scores)[S::kBlocks][2][4],
                                   ExactSoftmax<S>& softmax, ExactSums<S>& sums,
                                   float (&weights)[S::kBlocks][2][4]) {
  float factors[S::kBlocks][2];
  raise_max<S>(scores, softmax, factors);
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& weight = weights[n][i / 4][i % 4];
      weight = exp2_fast(scores[n][i / 4][i % 4] - softmax.max[n][i % 2]);
      softmax.sum[n][i % 2] += weight;
    }
#pragma unroll
    for (int r = 0; r < S::kPad / 16; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.out[n][r][i] *= factors[n][i % 2];
    }
  }
}

// The rotation of V (sign, Hadamard), of the sums of one column: half h is channel
// 64 (h / 8) + 8 g + h % 8. So all parts of an item are sums of the same basis.
template <class S>
__device__ inline void rotate_halves(const CudaAttendCall& call, const Lane& lane,
                                     float (&x)[S::kPad / 8]) {
  constexpr int kHalves = S::kPad / 8;
  const int block = hadamard_block(S::head_dim(call));
  const float norm = rsqrtf(static_cast<float>(block));
#pragma unroll
  for (int set = 0; set < kHalves / 8; ++set) {  // of 64 channels: two words of signs
    const std::uint32_t low = sign_word<S::kPad / 32>(2 * set);
    const std::uint32_t high = sign_word<S::kPad / 32>(2 * set + 1);
    const std::uint32_t bits = (lane.g < 4 ? low : high) >> 8 * (lane.g % 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[8 * set + i] = flip_sign(x[8 * set + i] * norm, bits, i);
  }
  const auto butterflies = [&](int step) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      if ((h & step) != 0) continue;
      const float a = x[h];
      const float b = x[h + step];
      x[h] = a + b;
      x[h + step] = a - b;
    }
  };
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    if (step < block) butterflies(step);
  }
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    if (2 * step >= block) continue;
    const float sign = (lane.index & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (float& value : x) value = fmaf(sign, value, __shfl_xor_sync(kFullWarp, value, step));
  }
#pragma unroll
  for (int step = 8; step < kHalves; step *= 2) {
    if (8 * step < block) butterflies(step);
  }
}

template <class S>
__device__ inline void store_exact(const CudaAttendCall& call, const DecodePlan& plan,
                                   const Lane& lane, const ExactSums<S>& sums, float* partial) {
  const int dim = S::head_dim(call);
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float x[S::kPad / 8];
#pragma unroll
      for (int h = 0; h < S::kPad / 8; ++h) x[h] = sums.out[n][h / 2][h % 2 * 2 + j];
      rotate_halves<S>(call, lane, x);
      const int column = 8 * n + 2 * lane.c + j;
      if (column >= plan.slot_columns) continue;
#pragma unroll
      for (int h = 0; h < S::kPad / 8; h += 4) {
        const int channel = 64 * (h / 8) + 8 * lane.g + h % 8;
        if (!S::kWhole && channel >= dim) continue;
        *reinterpret_cast<float4*>(partial + column * dim + channel) =
            make_float4(x[h], x[h + 1], x[h + 2], x[h + 3]);
      }
    }
  }
}

}  // namespace oscar::cuda
