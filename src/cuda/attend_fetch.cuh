// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// From pages to the shared memory of a warp: the keys of a group of four tiles with their tails
// (parameters), and its values, each asked for as soon as those of the group before are in use.
//
// The 16-byte chunks of each 128-byte row of codes are permuted (xor with twice the lane group c
// that reads the row), so that the eight lanes of a 16-byte access meet eight different bank
// groups.
#pragma once

#include <cstdint>

#include "cuda/attend_shape.cuh"
#include "cuda/mma.cuh"

namespace oscar::cuda {

// Position of chunk `chunk` of a section whose rows are read by lane group row / rows_per_group.
__host__ __device__ constexpr int swizzled_chunk(int chunk, int rows_per_group) {
  const int row = chunk / 8;
  return 8 * row + (chunk % 8 ^ 2 * (row / rows_per_group % 4));
}

// Addresses of 32 tiles at a time, a lane a tile, as offsets in shared memory.
inline constexpr int kStepTiles = 32;

template <class S>
struct DecodeFetch {
  static constexpr int kKeyRows = S::kLines;  // of 128 bytes, of a lane group
  static constexpr int kValueRows = S::kWhole ? S::kPad * S::kVBits / 128 : 0;

  const std::uint8_t* pages;  // of the KV head's first tile, from chunk `lane` on
  std::uint32_t keys_at;      // where chunk `lane` of a section goes
  std::uint32_t values_at;

  __device__ static const std::int32_t* page_of(const CudaAttendCall& call, const DecodePlan& plan,
                                                const WarpState<S>& state, int tile) {
    return call.cache.block_table + state.item.sequence.b * call.cache.max_pages +
           plan.page_of(tile);
  }
  __device__ static std::uint32_t tile_offset(const CudaAttendCall& call, const DecodePlan& plan,
                                              int tile, int page) {
    const int per_page = call.layout.tiles_per_page();
    const int within = tile - plan.page_of(tile) * per_page;
    const int valid = min(max(page, 0), static_cast<int>(call.cache.num_pages) - 1);
    const int index = valid * call.layout.kv_heads * per_page + within;
    return static_cast<std::uint32_t>(index) * static_cast<std::uint32_t>(tile_bytes(call) / 32);
  }

  __device__ static int tile_bytes(const CudaAttendCall& call) {
    if constexpr (!S::kAny) return S::kKeyBytes + S::kValueBytes + S::kTailBytes;
    return call.layout.tile().tile_bytes();
  }
  __device__ static int code_bytes(const CudaAttendCall& call) {
    return 4 * S::head_dim(call) * (S::kKBits + S::kVBits);
  }

  // Of the state's item; asks for nothing.
  __device__ void start(const CudaAttendCall& call, const WarpState<S>& state, const Lane& lane,
                        const char* warp) {
    const std::int64_t head =
        static_cast<std::int64_t>(state.item.kv_head) * call.layout.tiles_per_page();
    pages = kept(call.cache.pages + head * tile_bytes(call) + 16 * lane.index);
    const std::uint32_t shared = shared_address(warp);
    keys_at = kept(shared + S::kKeys + 16 * swizzled_chunk(lane.index, kKeyRows));
    if constexpr (kValueRows == kKeyRows) {
      values_at = keys_at - (S::kKeys - S::kValues);
    } else {
      values_at = kept(shared + S::kValues +
                       16 * (kValueRows > 0 ? swizzled_chunk(lane.index, kValueRows) : lane.index));
    }
  }

  // The page of tile `lane` of a segment that starts at `group`.
  __device__ static const std::int32_t* first_page(const CudaAttendCall& call,
                                                   const DecodePlan& plan,
                                                   const WarpState<S>& state, const Lane& lane,
                                                   int group, int last) {
    return page_of(call, plan, state, min(group * kGroupTiles + lane.index, last - 1));
  }

  // To the tiles from `group` on, `page` being that of tile `lane` of them; the pages of the step
  // after this are asked for.
  __device__ static void step(const CudaAttendCall& call, const DecodePlan& plan,
                              const WarpState<S>& state, const Lane& lane, int group, int last,
                              int page, char* warp) {
    const int tile = group * kGroupTiles + lane.index;
    reinterpret_cast<std::uint32_t*>(warp + S::kTileOffsets)[lane.index] =
        tile_offset(call, plan, min(tile, last - 1), page);
    __syncwarp();
    cp_async_4(shared_address(warp) + S::kNextPages + 4 * lane.index,
               page_of(call, plan, state, min(tile + kStepTiles, last - 1)));
  }
  __device__ static int next_page(const Lane& lane, const char* warp) {
    return reinterpret_cast<const int*>(warp + S::kNextPages)[lane.index];
  }

  // Chunk `lane` of the tiles of the group that starts `first` tiles after the step's first.
  __device__ void group_tiles(const char* warp, int first,
                              const std::uint8_t* (&tiles)[kGroupTiles]) const {
    const uint4 four = *reinterpret_cast<const uint4*>(warp + S::kTileOffsets + 4 * first);
    tiles[0] = pages + 32 * static_cast<std::uint64_t>(four.x);
    tiles[1] = pages + 32 * static_cast<std::uint64_t>(four.y);
    tiles[2] = pages + 32 * static_cast<std::uint64_t>(four.z);
    tiles[3] = pages + 32 * static_cast<std::uint64_t>(four.w);
  }

  // Tails and K codes of tiles begin .. end - 1 of this group.
  __device__ void keys(const CudaAttendCall& call, const Lane& lane, char* warp, int first,
                       int begin, int end) const {
    const int codes = code_bytes(call);
    const bool in_tail = 16 * lane.index < tile_bytes(call) - codes;
    const std::uint32_t tails = shared_address(warp) + S::kTails + 16 * lane.index;
    static_assert(S::kTailBytes <= 512);
    const std::uint8_t* tiles[kGroupTiles];
    group_tiles(warp, first, tiles);
#pragma unroll
    for (int t = 0; t < kGroupTiles; ++t) {
      if (t < begin || t >= end) continue;
      if (in_tail) cp_async_16(tails + t * S::kTailBytes, tiles[t] + codes);
      copy_codes<S::kKeyBytes, kKeyRows>(lane, tiles[t], 4 * S::head_dim(call) * S::kKBits, keys_at,
                                         t * S::kKeyBytes);
    }
  }

  // V codes of the same tiles.
  __device__ void values(const CudaAttendCall& call, const Lane& lane, const char* warp, int first,
                         int begin, int end) const {
    const std::uint8_t* tiles[kGroupTiles];
    group_tiles(warp, first, tiles);
#pragma unroll
    for (int t = 0; t < kGroupTiles; ++t) {
      if (t < begin || t >= end) continue;
      copy_codes<S::kValueBytes, kValueRows>(lane, tiles[t] + 4 * S::head_dim(call) * S::kKBits,
                                             4 * S::head_dim(call) * S::kVBits, values_at,
                                             t * S::kValueBytes);
    }
  }

  // A section of `bytes`, at most kBytes, whose rows of 128 bytes are read by lane group
  // row / kRows, to `own` + slot; kRows 0: not permuted.
  template <int kBytes, int kRows>
  __device__ static void copy_codes(const Lane& lane, const std::uint8_t* from, int bytes,
                                    std::uint32_t own, int slot) {
    if constexpr (S::kWhole) {
#pragma unroll
      for (int i = 0; i < kBytes / 512; ++i) {
        // Rows a multiple of 4 apart: the permutation differs by a constant, of bits that the
        // addresses of sections do not have.
        const int turn = 32 * (4 * i / kRows % 4);
        cp_async_16((own ^ turn) + slot + 512 * i, from + 512 * i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < (kBytes + 511) / 512; ++i) {
        const int chunk = lane.index + 32 * i;
        if (16 * chunk >= bytes) continue;
        const int place =
            kRows > 0 ? swizzled_chunk(chunk, kRows) - swizzled_chunk(lane.index, kRows) : 32 * i;
        cp_async_16(own + slot + 16 * place, from + 512 * i);
      }
    }
  }
};

}  // namespace oscar::cuda
