// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// One warp, one segment: a run of tiles, or of exact tokens, of one item, to one partial result.
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/attend_exact_any.cuh"
#include "cuda/attend_exact_half.cuh"
#include "cuda/attend_fetch.cuh"
#include "cuda/attend_packed.cuh"

namespace oscar::cuda {

// Packed tokens that each column sees, as [x, y), and where they are the same for all columns.
template <class S>
__device__ inline void set_bounds(const CudaAttendCall& call, const DecodePlan& plan,
                                  const Lane& lane, WarpState<S>& state, int2* bounds) {
  const DecodeSequence& s = state.item.sequence;
  if (lane.index < S::kColumns) {
    const DecodeColumn at = column_of(plan, state.item, lane.index);
    const int position = s.cached + at.query;
    bounds[lane.index] =
        make_int2(max(first_token(call, position), call.layout.sinks),
                  at.used ? kTileTokens * packed_tiles_of(call, plan, s, at.query) : 0);
  }
  const int first = max(first_token(call, s.cached), call.layout.sinks);
  const int last = max(first_token(call, s.cached + s.queries - 1), call.layout.sinks);
  const bool single = s.queries == 1;
  const bool capped = call.options.softcap > 0.0f;  // every tile has extra work
  if (lane.index == 0) {
    state.one = kOnes;
    state.zero = 0;
    state.seen = single ? make_int2(first, kTileTokens * s.packed_low) : make_int2(0, INT_MAX);
    state.plain = capped   ? make_int2(INT_MAX, 0)
                  : single ? make_int2(0, INT_MAX)
                           : make_int2((last + kTileTokens - 1) / kTileTokens, s.packed_low);
  }
}

// What multiplies a score and is added to it: K norm and log2 V scale of tokens g + 8 i.
struct TokenFactors {
  float norms[4];
  float logs[4];
};
template <class S>
__device__ inline TokenFactors token_factors(const Lane& lane, const char* tile) {
  const float4 norm = *reinterpret_cast<const float4*>(tile + S::kNorms + 16 * lane.g);
  const float4 log = *reinterpret_cast<const float4*>(tile + S::kLogScales + 16 * lane.g);
  return {{norm.x, norm.y, norm.z, norm.w}, {log.x, log.y, log.z, log.w}};
}

// Exponents of a tile that some column does not see whole, or with a soft cap. `bound`: the packed
// tokens that the column sees.
__device__ inline void special_exponents(const CudaAttendCall& call, const Lane& lane, int first,
                                         int2 bound, const TokenFactors& factors, float (&x)[4]) {
  const float cap = call.options.softcap * kLog2E;
  const float turn = __fdividef(2.0f * kLog2E, cap);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] *= factors.norms[i];
    if (cap > 0.0f) x[i] = soft_capped(x[i], cap, turn);
    x[i] += factors.logs[i];
    const int token = first + lane.g + 8 * i;
    if (token < bound.x || token >= bound.y) x[i] = -INFINITY;
  }
}

// Exponents of the tiles of a group. kPlain: of all four, without a look at the columns' bounds;
// else of those that are there.
template <class S, bool kPlain>
__device__ inline void score_group(const CudaAttendCall& call, const Lane& lane, const char* warp,
                                   const GroupTiles& tiles, const DecodeQuery<S>& query,
                                   GroupExponents<S>& exponents) {
#pragma unroll
  for (int t = 0; t < kGroupTiles; ++t) {
    if (!kPlain && !tiles.has(t)) {
#pragma unroll
      for (int i = 0; i < 4 * S::kLaneColumns; ++i) exponents[t][i / 4][i % 4] = -INFINITY;
      continue;
    }
    const char* tile = warp + t * S::kTileBytes;
    float scores[S::kBlocks][2][4];
    score_tile<S>(call, lane, tile, warp + S::kKeys + t * S::kKeyBytes, query, scores);
    const TokenFactors factors = token_factors<S>(lane, tile);
#pragma unroll
    for (int j = 0; j < S::kLaneColumns; ++j) {
      float (&x)[4] = exponents[t][j];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = scores[j / 2][i / 2][i % 2 * 2 + j % 2];
      if constexpr (kPlain) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = fmaf(x[i], factors.norms[i], factors.logs[i]);
      } else {
        const int2 bound = reinterpret_cast<const int2*>(warp + S::kBounds)[S::column(lane.c, j)];
        special_exponents(call, lane, kTileTokens * (kGroupTiles * tiles.group + t), bound, factors,
                          x);
      }
    }
  }
}

// The group whose keys and tails have come; asks for the next one's, `step` tiles after those of
// the fetch's step, where `more`.
template <class S, bool kPlain>
__device__ inline void attend_group(const CudaAttendCall& call, const Lane& lane, char* warp,
                                    const GroupTiles& tiles, const DecodeFetch<S>& fetch, int step,
                                    bool more, const DecodeQuery<S>& query,
                                    DecodeSoftmax<S>& softmax, PackedSums<S>& sums) {
  GroupExponents<S> exponents;
  score_group<S, kPlain>(call, lane, warp, tiles, query, exponents);
  __syncwarp();
  // All four where there is one: a tile past the end is the last one once more.
  if (more) fetch.keys(call, lane, warp, step, 0, kGroupTiles);
  cp_async_commit();
  GroupFactors<S> factors;
  std::uint32_t weights[kGroupTiles][S::kLaneColumns][2];
  weigh_group<S, kPlain>(lane, warp, tiles, exponents, softmax, factors, weights);
  cp_async_wait<1>();  // the values; the next keys are on their way
  __syncwarp();
  add_group<S, kPlain>(call, lane, warp, tiles, weights, factors, sums);
  __syncwarp();
}

// Tiles first .. last - 1 of the item.
template <class S>
__device__ inline void attend_packed_segment(const CudaAttendCall& call, const DecodePlan& plan,
                                             int first, int last, char* warp) {
  WarpState<S>& state = warp_state<S>(warp);
  const Lane lane = fresh_lane();
  DecodeFetch<S> fetch;
  int group = first / kGroupTiles;
  int begin = first - group * kGroupTiles;
  int end = min(last - group * kGroupTiles, kGroupTiles);
  const RawQuery<S> raw = load_raw_query<S>(call, plan, state.item, lane);
  fetch.start(call, plan, state, lane, group, last, warp);
  if (lane.index == 0) state.last_tile = last;
  fetch.keys(call, lane, warp, 0, begin, end);
  cp_async_commit();
  set_bounds<S>(call, plan, lane, state, reinterpret_cast<int2*>(warp + S::kBounds));
  DecodeQuery<S> query;
  load_query<S>(call, plan, lane, raw, state, query);
  DecodeSoftmax<S> softmax;
  PackedSums<S> sums;
  softmax.clear();
  sums.clear();
#pragma unroll 1
  for (int step = 0; end > 0; ++group, begin = 0) {
    cp_async_wait<0>();  // the keys
    __syncwarp();
    const Lane here = fresh_lane();
    fetch.values(call, here, warp, step, begin, end);
    cp_async_commit();
    const int tile = group * kGroupTiles;
    const GroupTiles tiles{group, begin, end,
                           make_int2(max(state.seen.x, kTileTokens * (tile + begin)),
                                     min(state.seen.y, kTileTokens * (tile + end)))};
    const std::uint32_t units = units_word(norm_word<S>(call, here, warp), here);
    unpack_channels<S>(call, here, warp, tiles, state, query, units);
    unpack_tokens<S>(call, here, warp, tiles, state.log_unit, units);
    __syncwarp();
    const int behind = state.last_tile;
    const int next_end = min(behind - (group + 1) * kGroupTiles, kGroupTiles);
    step += kGroupTiles;
    if (step == kStepTiles) {
      step = 0;
      fetch.step(call, plan, state, here, group + 1, behind, fetch.next_page(here, warp), warp);
    }
    if (end - begin > 2 && tile + begin >= state.plain.x && tile + end <= state.plain.y) {
      attend_group<S, true>(call, here, warp, tiles, fetch, step, next_end > 0, query, softmax,
                            sums);
    } else {
      attend_group<S, false>(call, here, warp, tiles, fetch, step, next_end > 0, query, softmax,
                             sums);
    }
    end = next_end;
  }
  cp_async_wait<0>();
  __syncwarp();
  const Lane here = fresh_lane(state.zero);
  float* partial = partial_of<S>(call, plan, warp, 1);
  store_packed<S>(call, plan, here, sums, partial);
#pragma unroll
  for (int j = 0; j < S::kLaneColumns; ++j) {
    store_softmax(plan, here, S::head_dim(call), S::column(here.c, j), softmax.max[j],
                  softmax.sum[j], partial);
  }
  __syncwarp();
}

template <class S, class Math>
__device__ inline void attend_exact_segment(const CudaAttendCall& call, const DecodePlan& plan,
                                            int first, int last, char* warp) {
  const WarpState<S>& state = warp_state<S>(warp);
  const DecodeSequence& s = state.item.sequence;
  const Lane start = fresh_lane();
  auto& tile = *reinterpret_cast<ExactTile<S>*>(warp);
  const int begin = kTileTokens / kExactTokens * first;
  const int end =
      min(kTileTokens / kExactTokens * last, (s.exact_tokens + kExactTokens - 1) / kExactTokens);
  Math math;
  {
    // A column without a query takes the rows of the last: its scores are masked.
    const std::byte* queries[S::kBlocks];
    const int columns = s.queries * plan.group - state.item.first_column;
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) {
      const DecodeColumn at = column_of(plan, state.item, min(8 * n + start.g, columns - 1));
      queries[n] = row_address(call.q, s.first_row + at.query, at.q_head);
    }
    math.load_query(call, start, queries);
  }
  ExactSoftmax<S> softmax;
  ExactSums<S> sums;
  softmax.clear();
  sums.clear();
  set_exact_bounds<S>(call, plan, state.item, start, tile);
  // Each part is asked for while those of all slots are to come or in use.
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
    }
    cp_async_commit();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) rows[i] = rows[i + 1];
  } while (++part < end);
  __syncwarp();  // also where nothing was done
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

// One dtype for all rows is the rule; what else there is may be slower.
template <class S>
__device__ inline void attend_exact_any(const CudaAttendCall& call, const DecodePlan& plan,
                                        int first, int last, char* warp) {
  const DType type = call.layout.exact_dtype;
  const bool uniform = call.q.dtype == type && call.k_new.dtype == type && call.v_new.dtype == type;
  if (uniform && type == DType::kBF16) {
    using Math = ExactHalf<S, DType::kBF16>;
    attend_exact_segment<S, Math>(call, plan, first, last, warp);
  } else if (uniform && type == DType::kF16) {
    using Math = ExactHalf<S, DType::kF16>;
    attend_exact_segment<S, Math>(call, plan, first, last, warp);
  } else {
    attend_exact_segment<S, ExactAny<S>>(call, plan, first, last, warp);
  }
}

}  // namespace oscar::cuda
