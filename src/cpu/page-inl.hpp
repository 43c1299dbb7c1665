// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Rows of a caller's dtype in and out of float, and the addresses of tiles and exact rows. Copies
// of the functions of core/rows.hpp for this target: an inline function that is shared between
// translation units may be linked in the copy that was compiled for a newer CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "oscar/cache.hpp"

namespace oscar::cpu {
namespace {

inline std::int64_t bytes_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// head_dim is a multiple of 16, so no vector is partial.
inline void load_floats(const std::byte* source, DType dtype, int count, float* target) {
  switch (dtype) {
    case DType::kF32:
      std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(float));
      return;
    case DType::kF16:
      for (int i = 0; i < count; i += kLanes) store(target + i, load_fp16(source + 2 * i));
      return;
    case DType::kBF16:
      for (int i = 0; i < count; i += kLanes) store(target + i, load_bf16(source + 2 * i));
      return;
  }
}

inline void store_floats(const float* source, DType dtype, int count, std::byte* target) {
  switch (dtype) {
    case DType::kF32:
      std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(float));
      return;
    case DType::kF16:
      for (int i = 0; i < count; i += kLanes) store_fp16(target + 2 * i, load(source + i));
      return;
    case DType::kBF16:
      for (int i = 0; i < count; i += kLanes) store_bf16(target + 2 * i, load(source + i));
      return;
  }
}

struct Side {
  static constexpr int kKey = 0;
  static constexpr int kValue = 1;
};

inline std::byte* exact_address(const Layout& layout, const CacheView& cache, int b, int side,
                                int kv_head, std::int64_t row) {
  const ExactPlace place = exact_place(layout, side, static_cast<std::int32_t>(row));
  const std::int64_t slot =
      cache.slot[static_cast<std::int64_t>(b) * layout.exact_blocks + place.block];
  const std::int64_t stride =
      cache.exact_stride == 0 ? layout.exact_block_bytes() : cache.exact_stride;
  const std::int64_t head = std::int64_t{place.plane} * layout.kv_heads + kv_head;
  const std::int64_t index = head * layout.exact_block_rows() + place.row;
  return static_cast<std::byte*>(cache.exact) + slot * stride +
         index * layout.head_dim * bytes_of(layout.exact_dtype);
}

inline std::byte* ring_address(const Layout& layout, const CacheView& cache, int b, int side,
                               int kv_head, std::int64_t position) {
  return exact_address(layout, cache, b, side, kv_head, position % layout.ring_tokens());
}

inline std::byte* sink_address(const Layout& layout, const CacheView& cache, int b, int side,
                               int kv_head, std::int64_t position) {
  return exact_address(layout, cache, b, side, kv_head, layout.ring_tokens() + position);
}

inline const std::byte* row_address(const ConstRows& rows, std::int64_t token, int head) {
  return static_cast<const std::byte*>(rows.data) +
         bytes_of(rows.dtype) * (token * rows.token_stride + head * rows.head_stride);
}

// Of `count` values a KV head, or null, those of one head.
template <typename T>
inline const T* head_values(const T* values, int kv_head, int count) {
  return values == nullptr ? nullptr : values + static_cast<std::int64_t>(kv_head) * count;
}

inline std::uint8_t* tile_at(const Layout& layout, const CacheView& cache, int b, int kv_head,
                             std::int64_t tile) {
  const std::int64_t per_page = layout.page_tokens / kTileTokens;
  const std::int64_t page = cache.block_table[b * cache.max_pages + tile / per_page];
  const std::int64_t index = (page * layout.kv_heads + kv_head) * per_page + tile % per_page;
  return cache.pages + index * layout.tile().tile_bytes();
}

// Tiles are read in steps of up to four: one pass of the softmax, one load of the sums a step.
inline constexpr int kStepTiles = 4;
inline constexpr int kStepTokens = kStepTiles * kTileTokens;

struct PackedTiles {
  TileLayout layout;
  int count;
  const std::uint8_t* at[kStepTiles];
  // Tiles of the next step, to be prefetched; the last tile again where there is none.
  const std::uint8_t* next[kStepTiles];
};

inline void prefetch(const std::uint8_t* address) { __builtin_prefetch(address); }

}  // namespace
}  // namespace oscar::cpu
