// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// One warp, one segment: a run of tiles of one item, to one partial result.
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/attend_ahead.cuh"
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
  const bool same_first = first == last;
  const bool same_last = s.packed_low == s.packed_high;
  const bool capped = call.options.softcap > 0.0f;  // every tile has extra work
  if (lane.index == 0) {
    state.one = kOnes;
    state.zero = 0;
    state.seen =
        make_int2(same_first ? first : 0, same_last ? kTileTokens * s.packed_low : INT_MAX);
    state.plain = make_int2(same_first ? 0 : (last + kTileTokens - 1) / kTileTokens,
                            same_last ? INT_MAX : s.packed_low);
    if (capped) state.plain = make_int2(INT_MAX, 0);
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
// tokens that the column sees; center: its state's, which the cap has to see.
__device__ inline void special_exponents(const CudaAttendCall& call, const Lane& lane, int first,
                                         int2 bound, float center, const TokenFactors& factors,
                                         float (&x)[4]) {
  const float cap = call.options.softcap * kLog2E;
  const float turn = __fdividef(2.0f * kLog2E, cap);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] *= factors.norms[i];
    if (cap > 0.0f) x[i] = soft_capped(x[i] + center, cap, turn);
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
        const int column = S::column(lane.c, j);
        const int2 bound = reinterpret_cast<const int2*>(warp + S::kBounds)[column];
        special_exponents(call, lane, kTileTokens * (kGroupTiles * tiles.group + t), bound,
                          reinterpret_cast<const WarpState<S>*>(warp + S::kState)->center[column],
                          factors, x);
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

// Running sums of a segment of tiles.
template <class S>
struct SegmentSums {
  DecodeSoftmax<S> softmax;
  PackedSums<S> sums;
};

// attend_group where columns see different tokens, or with a soft cap: out of the way.
template <class S>
__device__ __noinline__ SegmentSums<S> attend_special_group(const CudaAttendCall& call, char* warp,
                                                            GroupTiles tiles, DecodeFetch<S> fetch,
                                                            int step, bool more,
                                                            DecodeQuery<S> query,
                                                            SegmentSums<S> total) {
  attend_group<S, false>(call, fresh_lane(), warp, tiles, fetch, step, more, query, total.softmax,
                         total.sums);
  return total;
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
  RawQuery<S> raw;
  fetch.start(call, state, lane, warp);
  if (call.cache.center != nullptr) {
    ask_center<S>(call, state.item, lane, warp);
    cp_async_commit();
  }
  if (S::kAhead && (state.slots & 1) != 0) {  // asked for by the item's exact tokens
    raw = query_ahead<S>(warp)[lane.index];
    cp_async_commit();  // nothing: behind the center, as the keys below
  } else {
    raw = load_raw_query<S>(call, plan, state.item, lane);
    const int page = *fetch.first_page(call, plan, state, lane, group, last);
    fetch.step(call, plan, state, lane, group, last, page, warp);
    fetch.keys(call, lane, warp, 0, begin, end);
    cp_async_commit();
  }
  if (lane.index == 0) state.last_tile = last;
  set_bounds<S>(call, plan, lane, state, reinterpret_cast<int2*>(warp + S::kBounds));
  DecodeQuery<S> query;
  load_query<S>(call, plan, lane, raw, warp, state, query);
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
    if (tile + begin >= state.plain.x && tile + end <= state.plain.y) [[likely]] {
      attend_group<S, true>(call, here, warp, tiles, fetch, step, next_end > 0, query, softmax,
                            sums);
    } else {
      const SegmentSums<S> total = attend_special_group<S>(
          call, warp, tiles, fetch, step, next_end > 0, query, SegmentSums<S>{softmax, sums});
      softmax = total.softmax;
      sums = total.sums;
    }
    end = next_end;
  }
  cp_async_wait<0>();
  __syncwarp();
  const Lane here = fresh_lane(state.zero);
  float* partial = partial_of<S>(call, plan, warp, 1);
  store_packed<S>(call, plan, here, sums, partial);
  // All scores of the segment lack the center: with it the maximum is what differs.
  const bool capped = call.options.softcap > 0.0f;
#pragma unroll
  for (int j = 0; j < S::kLaneColumns; ++j) {
    const int column = S::column(here.c, j);
    const float max = softmax.max[j] + (capped ? 0.0f : state.center[column]);
    store_softmax(plan, here, S::head_dim(call), column, max, softmax.sum[j], partial);
  }
  __syncwarp();
}

}  // namespace oscar::cuda
