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
#include "cuda/combine.cuh"
#include "cuda/mma.cuh"
#include "cuda/page.cuh"
#include "cuda/softmax.cuh"

namespace oscar::cuda {

// Where the rows of 32 exact tokens are.
struct ExactTokens {
  const std::byte* keys[kTileTokens];
  const std::byte* values[kTileTokens];
  int tokens[kTileTokens];  // -1: none, and the rows of some other token
  DType key_types[kTileTokens];
  DType value_types[kTileTokens];
};

// In the shared memory of a warp: these tokens and the next, and the weights.
template <class S>
struct ExactTile {
  ExactTokens tokens[2];
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
__device__ inline ExactRows exact_rows(const CudaAttendCall& call, const DecodePlan& plan,
                                       const DecodeItem& item, int token) {
  const DecodeSequence& s = item.sequence;
  if (token >= s.cached) {
    const int row = s.first_row + token - s.cached;
    return {row_address(call.k_new, row, item.kv_head), row_address(call.v_new, row, item.kv_head),
            call.k_new.dtype, call.v_new.dtype};
  }
  const DecodeExact& exact = plan.exact;
  const bool sink = token < call.layout.sinks;
  const int rows = sink ? exact.sink_part : exact.ring_part;
  int row = sink ? token : exact.ring_row(token);
  const int part = row >= rows ? 1 : 0;
  row += (sink ? exact.ring_part : 0) - part * rows;
  int key_slot = s.slot;
  int value_slot = s.slot;
  if (call.layout.exact_blocks > 1) {
    const std::int32_t* slots = call.cache.slot + s.b * call.layout.exact_blocks + part;
    key_slot = slots[0];
    value_slot = slots[exact.value_block];
  }
  const auto* from =
      static_cast<const std::byte*>(call.cache.exact) +
      static_cast<std::uint32_t>((item.kv_head * exact.head_rows + row) * exact.row_bytes);
  const DType type = call.layout.exact_dtype;
  return {from + key_slot * exact.stride, from + value_slot * exact.stride + exact.value_offset,
          type, type};
}

// Token `index` of the exact ones.
__device__ inline int exact_token(const DecodeSequence& s, int index) {
  return index < s.sinks ? index : s.exact_first + index - s.sinks;
}

// Lane t: exact token 32 unit + t. ahead: its rows to L2 already: under load each wait for memory
// is one for all the tiles that were asked for before.
__device__ inline void find_rows(const CudaAttendCall& call, const DecodePlan& plan,
                                 const DecodeItem& item, int unit, int t, bool ahead,
                                 ExactTokens& to) {
  const DecodeSequence& s = item.sequence;
  const int index = min(kTileTokens * unit + t, s.exact_tokens - 1);
  const int token = exact_token(s, index);
  const ExactRows rows = exact_rows(call, plan, item, token);
  to.tokens[t] = index == kTileTokens * unit + t ? token : -1;
  to.keys[t] = rows.key;
  to.values[t] = rows.value;
  to.key_types[t] = rows.key_type;
  to.value_types[t] = rows.value_type;
  const int bytes = ahead ? call.layout.head_dim * bytes_of(rows.key_type) : 0;
#pragma unroll 1  // short code: it comes from memory, once
  for (int at = 0; at < bytes; at += 128) {
    prefetch_l2(rows.key + at);
    prefetch_l2(rows.value + at);
  }
}

// Scores in units of log2, -infinity where the column does not read the token exactly.
template <class S>
__device__ inline void finish_exact_scores(const CudaAttendCall& call, const Lane& lane,
                                           const ExactTile<S>& tile, const ExactTokens& tokens,
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
        const int token = tokens.tokens[lane.g + 8 * i];
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

// The sums of the segment's columns, rotated as packed ones are (sign, Hadamard), so that all parts
// of an item are sums of the same basis. rows: shared memory, may be `partial`.
template <class S>
__device__ inline void store_exact(const CudaAttendCall& call, const DecodePlan& plan,
                                   const Lane& lane, const ExactSums<S>& sums, float* rows,
                                   float* partial) {
  using Row = RowSums<S>;
  const int dim = S::head_dim(call);
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = 8 * n + 2 * lane.c + j;
      if (column >= plan.slot_columns) continue;
#pragma unroll
      for (int h = 0; h < S::kPad / 8; h += 4) {
        const int channel = 64 * (h / 8) + 8 * lane.g + h % 8;
        if (!S::kWhole && channel >= dim) continue;
        const auto x = [&](int i) { return sums.out[n][(h + i) / 2][(h + i) % 2 * 2 + j]; };
        *reinterpret_cast<float4*>(rows + column * dim + channel) =
            make_float4(x(0), x(1), x(2), x(3));
      }
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int column = 0; column < plan.slot_columns; ++column) {
    float x[Row::kChannels];
    load_part<S, false>(rows + column * dim, dim, lane.index, x);
    flip_row<S>(dim, lane.index, x);
    hadamard_row<S>(dim, lane.index, x);
    store_part<S>(partial + column * dim, dim, lane.index, x);
  }
}

}  // namespace oscar::cuda
