// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Conversions between a row of a caller's dtype and float, and the addresses of exact rows.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/half.hpp"
#include "oscar/cache.hpp"
#include "oscar/tensor.hpp"

namespace oscar {

inline float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
inline std::uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float fp16_to_float(std::uint16_t bits) {
  return static_cast<float>(std::bit_cast<Half>(bits));
}

inline std::uint16_t float_to_fp16(float value) {
  return std::bit_cast<std::uint16_t>(static_cast<Half>(value));
}

inline void load_row(const std::byte* source, DType dtype, int count, float* target) {
  if (dtype == DType::kF32) {
    std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  for (int i = 0; i < count; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, source + 2 * i, sizeof bits);
    target[i] = dtype == DType::kBF16 ? bf16_to_float(bits) : fp16_to_float(bits);
  }
}

inline void store_row(const float* source, DType dtype, int count, std::byte* target) {
  if (dtype == DType::kF32) {
    std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  for (int i = 0; i < count; ++i) {
    const std::uint16_t bits =
        dtype == DType::kBF16 ? float_to_bf16(source[i]) : float_to_fp16(source[i]);
    std::memcpy(target + 2 * i, &bits, sizeof bits);
  }
}

enum class Side : std::uint8_t { kKey = 0, kValue = 1 };

// Of values [kv_heads, head_dim], or null, those of one head.
inline const float* head_values(const float* values, const Layout& layout, int kv_head) {
  return values == nullptr ? nullptr
                           : values + static_cast<std::ptrdiff_t>(kv_head) * layout.head_dim;
}

// Row `row` (ring_row or sink_row) of sequence `b` in the exact memory.
inline std::byte* exact_row(const Layout& layout, const CacheView& cache, int b, Side side,
                            int kv_head, std::int64_t row) {
  const ExactPlace place =
      exact_place(layout, static_cast<std::int32_t>(side), static_cast<std::int32_t>(row));
  const std::int64_t slot =
      cache.slot[static_cast<std::int64_t>(b) * layout.exact_blocks + place.block];
  const std::int64_t stride =
      cache.exact_stride == 0 ? layout.exact_block_bytes() : cache.exact_stride;
  const std::int64_t head = std::int64_t{place.plane} * layout.kv_heads + kv_head;
  const std::int64_t index = head * layout.exact_block_rows() + place.row;
  return static_cast<std::byte*>(cache.exact) + slot * stride +
         index * layout.head_dim * static_cast<std::int64_t>(size_of(layout.exact_dtype));
}

// Tile `tile` of sequence `b`, through the block table.
inline std::uint8_t* tile_address(const Layout& layout, const CacheView& cache, int b, int kv_head,
                                  std::int64_t tile) {
  const std::int64_t page = cache.block_table[b * cache.max_pages + tile / layout.tiles_per_page()];
  const std::int64_t within = tile % layout.tiles_per_page();
  const std::int64_t index = (page * layout.kv_heads + kv_head) * layout.tiles_per_page() + within;
  return cache.pages + index * layout.tile().tile_bytes();
}

}  // namespace oscar
