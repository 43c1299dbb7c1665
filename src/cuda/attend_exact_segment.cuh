// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// One warp, one segment: a run of exact tokens of one item, to one partial result.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/attend_ahead.cuh"
#include "cuda/attend_exact_any.cuh"
#include "cuda/attend_exact_half.cuh"

namespace oscar::cuda {

// The query rows of each column; one without a query takes those of the last: its scores are
// masked.
template <class S, class Math>
__device__ inline void load_exact_query(const CudaAttendCall& call, const DecodePlan& plan,
                                        const DecodeItem& item, const Lane& lane, int last_part,
                                        Math& math) {
  const DecodeSequence& s = item.sequence;
  const std::byte* queries[S::kBlocks];
  const int columns = s.queries * plan.group - item.first_column;
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
    const DecodeColumn at = column_of(plan, item, min(8 * n + lane.g, columns - 1));
    queries[n] = row_address(call.q, s.first_row + at.query, at.q_head);
  }
  math.load_query(call, lane, last_part, queries);
}

template <class S, class Math>
__device__ inline void store_exact_segment(const CudaAttendCall& call, const DecodePlan& plan,
                                           const ExactSums<S>& sums, const ExactSoftmax<S>& softmax,
                                           char* warp) {
  const Lane lane = fresh_lane();
  float* partial = partial_of<S>(call, plan, warp, 0);
  store_exact<S, Math>(call, plan, lane, sums, reinterpret_cast<float*>(warp), partial);
#pragma unroll
  for (int i = 0; i < 2 * S::kBlocks; ++i) {
    store_softmax(plan, lane, S::head_dim(call), 8 * (i / 2) + 2 * lane.c + i % 2,
                  softmax.max[i / 2][i % 2], softmax.sum[i / 2][i % 2], partial);
  }
  __syncwarp();
}

// Exact tokens from 32 first to 32 last - 1, as far as there are any; the segment in the state is
// then that of the tiles behind them, if the warp goes on with these.
template <class S, class Math>
__device__ inline void attend_exact_segment(const CudaAttendCall& call, const DecodePlan& plan,
                                            int first, int last, char* warp) {
  WarpState<S>& state = warp_state<S>(warp);
  const DecodeSequence& s = state.item.sequence;
  const Lane start = fresh_lane();
  auto& tile = *reinterpret_cast<ExactTile<S>*>(warp);
  const int parts = (s.exact_tokens + kExactTokens - 1) / kExactTokens;
  const int begin = min(kTileTokens / kExactTokens * first, parts);
  const int end = min(kTileTokens / kExactTokens * last, parts);
  ask_page_behind<S>(call, plan, state, start, warp);
  Math math;
  load_exact_query<S>(call, plan, state.item, start, end - 1, math);
  ExactSoftmax<S> softmax;
  ExactSums<S> sums;
  softmax.clear();
  sums.clear();
  set_exact_bounds<S>(call, plan, state.item, start, tile);
  // Each part is asked for while those of all slots are to come or in use; behind the last one the
  // keys of tiles.
  constexpr int kSlots = S::kExactSlots;
  const std::byte* rows[kSlots + 1] = {};
  int part = begin - kSlots;
#pragma unroll 1
  do {
    const Lane lane = fresh_lane();
    if (part >= begin) {
      cp_async_wait<kSlots - 1>();
      __syncwarp();
      float scores[S::kBlocks][4] = {};
      math.score(call, s, lane, part, rows[0], tile, scores);
      finish_exact_scores<S>(call, s, lane, tile, part, scores);
      weigh_exact<S>(scores, softmax, sums);
      math.add(call, s, lane, part, rows[0], tile, scores, sums);
      __syncwarp();
    }
    if (part + kSlots < end) {
      rows[kSlots] = find_row(call, plan, state.item, part + kSlots, lane.index);
      math.stage(call, lane, part + kSlots, rows[kSlots], tile);
    } else if (part + kSlots == end) {
      ask_keys_behind<S>(call, plan, state, lane, part >= begin, warp);
    }
    cp_async_commit();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) rows[i] = rows[i + 1];
  } while (++part < end);
  __syncwarp();  // also where nothing was done
  store_exact_segment<S, Math>(call, plan, sums, softmax, warp);
  if (tiles_behind<S>(state).y == 0) return;
  const Lane lane = fresh_lane();
  math.leave_query(call, plan, state.item, lane, query_ahead<S>(warp));
  go_on_with_tiles<S>(lane, state);
}

// Rows of other dtypes: out of the way.
template <class S>
__device__ __noinline__ void attend_exact_other(const CudaAttendCall& call, const DecodePlan& plan,
                                                int first, int last, char* warp) {
  attend_exact_segment<S, ExactAny<S>>(call, plan, first, last, warp);
}

// One 16-bit dtype for all rows is the rule; what else there is may be slower.
template <class S>
__device__ inline void attend_exact_any(const CudaAttendCall& call, const DecodePlan& plan,
                                        int first, int last, char* warp) {
  const DType type = call.layout.exact_dtype;
  const bool uniform = call.q.dtype == type && call.k_new.dtype == type && call.v_new.dtype == type;
  if (uniform && type != DType::kF32) [[likely]] {
    attend_exact_segment<S, ExactHalf<S>>(call, plan, first, last, warp);
  } else {
    attend_exact_other<S>(call, plan, first, last, warp);
  }
}

}  // namespace oscar::cuda
