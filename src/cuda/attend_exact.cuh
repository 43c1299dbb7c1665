// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Exact tokens (sinks, ring, the call's own rows) of an item, in the original basis, 16 at a time:
// what both ways to multiply them share (attend_exact_half.cuh, attend_exact_any.cuh).
//
// Short code matters more than anything here: few warps go through it, mostly once or twice, and
// its instructions come from memory while all tiles of the call do.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include "cuda/attend_query.cuh"
#include "cuda/attend_shape.cuh"
#include "cuda/combine.cuh"
#include "cuda/mma.cuh"
#include "cuda/page.cuh"
#include "cuda/softmax.cuh"

namespace oscar::cuda {

inline constexpr int kExactTokens = 16;

// In the shared memory of a warp, before rows that are staged.
template <class S>
struct ExactTile {
  int4 bounds[8 * S::kBlocks];  // of a column: first token, last token, end of the packed ones
  float weights[8 * S::kBlocks][kExactTokens + 4];
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

// out[n][r]: two blocks of 8 channels, one in each row of the operand that lane group g has, times
// the columns 2 c and 2 c + 1. Which channels these are is the way's own.
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

// Token `index` of the exact ones.
__device__ inline int exact_token(const DecodeSequence& s, int index) {
  return index < s.sinks ? index : s.exact_first + index - s.sinks;
}

// The K or V row of an exact token.
__device__ inline const std::byte* exact_row(const CudaAttendCall& call, const DecodePlan& plan,
                                             const DecodeItem& item, int token, bool is_value) {
  const DecodeSequence& s = item.sequence;
  if (token >= s.cached) {
    return row_address(is_value ? call.v_new : call.k_new, s.first_row + token - s.cached,
                       item.kv_head);
  }
  const DecodeExact& exact = plan.exact;
  const bool sink = token < call.layout.sinks;
  const int rows = sink ? exact.sink_part : exact.ring_part;
  int row = sink ? token : exact.ring_row(token);
  const int part = row >= rows ? 1 : 0;
  row += (sink ? exact.ring_part : 0) - part * rows;
  int slot = s.slot;
  if (call.layout.exact_blocks > 1) {
    slot =
        call.cache.slot[s.b * call.layout.exact_blocks + part + (is_value ? exact.value_block : 0)];
  }
  const auto within =
      static_cast<std::uint32_t>((item.kv_head * exact.head_rows + row) * exact.row_bytes) +
      (is_value ? exact.value_offset : 0u);
  return static_cast<const std::byte*>(call.cache.exact) + within + slot * exact.stride;
}

// Of the 16 tokens of a part: lane t has the K row of token t, lane 16 + t its V row. Past the end
// the last token's.
__device__ inline const std::byte* find_row(const CudaAttendCall& call, const DecodePlan& plan,
                                            const DecodeItem& item, int part, int lane) {
  const DecodeSequence& s = item.sequence;
  const int index = min(kExactTokens * part + (lane & (kExactTokens - 1)), s.exact_tokens - 1);
  return exact_row(call, plan, item, exact_token(s, index), lane >= kExactTokens);
}

__device__ inline const std::byte* row_of_lane(const std::byte* row, int lane) {
  return reinterpret_cast<const std::byte*>(
      __shfl_sync(kFullWarp, reinterpret_cast<std::uint64_t>(row), lane));
}

// Scores in units of log2, -infinity where the column does not read the token exactly.
template <class S>
__device__ inline void finish_exact_scores(const CudaAttendCall& call, const DecodeSequence& s,
                                           const Lane& lane, const ExactTile<S>& tile, int part,
                                           float (&scores)[S::kBlocks][4]) {
  const float scale = call.options.scale * kLog2E;
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
    for (float& score : scores[n]) score *= scale;
  }
  if (call.options.softcap > 0.0f) cap_scores<S>(call.options.softcap, scores);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int index = kExactTokens * part + lane.g + 8 * half;
    const int token = exact_token(s, index);
    const bool exists = index < s.exact_tokens;
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int4 bound = tile.bounds[8 * n + 2 * lane.c + j];
        const bool seen = exists && token >= bound.x && token <= bound.y &&
                          (token < call.layout.sinks || token >= bound.z);
        if (!seen) scores[n][2 * half + j] = -INFINITY;
      }
    }
  }
}

// From scores to weights.
template <class S>
__device__ inline void weigh_exact(float (&scores)[S::kBlocks][4], ExactSoftmax<S>& softmax,
                                   ExactSums<S>& sums) {
  float factors[S::kBlocks][2];
  raise_max<S>(scores, softmax, factors);
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = exp2_fast(scores[n][i] - softmax.max[n][i % 2]);
      softmax.sum[n][i % 2] += scores[n][i];
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
template <class S, class Math>
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
      for (int h = 0; h < S::kPad / 8; ++h) {
        const int channel = Math::channel(lane, h);
        if (S::kWhole || channel < dim) {
          rows[column * dim + channel] = sums.out[n][h / 2][h % 2 * 2 + j];
        }
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
