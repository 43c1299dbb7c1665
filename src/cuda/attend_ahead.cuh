// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// From exact tokens to the tiles of the same item that a warp goes on with: the first keys are
// asked for while the last exact tokens are in use, and the query need not come from memory again.
// Else a warp would wait for the query, for the block table and for the keys in turn, 8 us under
// load.
#pragma once

#include <cstdint>

#include "cuda/attend_fetch.cuh"
#include "cuda/attend_query.cuh"
#include "cuda/attend_shape.cuh"

namespace oscar::cuda {

// Tiles x to y - 1: those of units begin to end - 1 of an item, none of them exact.
__device__ inline int2 tiles_of(const DecodeSequence& s, int level, int begin, int end) {
  const int shift = tile_shift(level);
  const int unit = (s.first_tile >> shift) - s.exact_units;
  return make_int2(max((unit + begin) << shift, s.first_tile),
                   min((unit + end) << shift, s.packed_high));
}

// Units of the item behind the segment that are the warp's, too.
template <class S>
__device__ inline int units_behind(const WarpState<S>& state) {
  return min(state.last - state.next, state.item.sequence.item_units() - state.begin - state.units);
}

// What the warp goes on with behind the exact tokens of its segment; y is 0 where that is nothing.
template <class S>
__device__ inline int2 tiles_behind(const WarpState<S>& state) {
  if constexpr (!S::kAhead) return make_int2(0, 0);
  const DecodeSequence& s = state.item.sequence;
  const int begin = state.begin + state.units;
  const int units = units_behind<S>(state);
  if (begin < s.exact_units || units <= 0) return make_int2(0, 0);
  return tiles_of(s, state.level, begin, begin + units);
}

// Asks for their page, at the start of the exact tokens.
template <class S>
__device__ inline void ask_page_behind(const CudaAttendCall& call, const DecodePlan& plan,
                                       const WarpState<S>& state, const Lane& lane,
                                       const char* warp) {
  const int2 tiles = tiles_behind<S>(state);
  if (tiles.y == 0) return;
  cp_async_4(shared_address(warp) + S::kNextPages + 4 * lane.index,
             DecodeFetch<S>::first_page(call, plan, state, lane, tiles.x / kGroupTiles, tiles.y));
}

// Asks for their keys, to slot 1 of the exact rows. `page_is_here`: known to have come.
template <class S>
__device__ inline void ask_keys_behind(const CudaAttendCall& call, const DecodePlan& plan,
                                       const WarpState<S>& state, const Lane& lane,
                                       bool page_is_here, char* warp) {
  const int2 tiles = tiles_behind<S>(state);
  if (tiles.y == 0) return;
  if (!page_is_here) {
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
  }
  const int group = tiles.x / kGroupTiles;
  DecodeFetch<S> fetch;
  fetch.start(call, state, lane, warp);
  fetch.step(call, plan, state, lane, group, tiles.y, fetch.next_page(lane, warp), warp);
  fetch.keys(call, lane, warp, 0, tiles.x - group * kGroupTiles,
             min(tiles.y - group * kGroupTiles, kGroupTiles));
}

// Where the query is left for the tiles.
template <class S>
__device__ inline RawQuery<S>* query_ahead(char* warp) {
  static_assert(!S::kAhead || S::kValues + 32 * sizeof(RawQuery<S>) <= S::kTails);
  return reinterpret_cast<RawQuery<S>*>(warp + S::kValues);
}

// To the segment of these tiles, as next_segment would go.
template <class S>
__device__ inline void go_on_with_tiles(const Lane& lane, WarpState<S>& state) {
  const int units = units_behind<S>(state);
  __syncwarp();
  if (lane.index == 0) {
    state.slots |= 1;
    state.begin += state.units;
    state.units = units;
    state.next += units;
    state.done += units;
  }
  __syncwarp();
}

}  // namespace oscar::cuda
