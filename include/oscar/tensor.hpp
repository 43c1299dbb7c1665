// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Non-owning views of the caller's arrays. No torch, CUDA or SIMD types.
#pragma once

#include <cstddef>
#include <cstdint>

namespace oscar {

enum class DType : std::uint8_t { kF32, kF16, kBF16 };

constexpr std::size_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
constexpr const char* name_of(DType dtype) {
  return dtype == DType::kF32 ? "float32" : dtype == DType::kF16 ? "float16" : "bfloat16";
}

// Rows of one vector a token and head: [tokens, heads, head_dim], head_dim contiguous, strides of
// the two outer axes in elements. `data` may be null where `tokens` is 0.
struct ConstRows {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  std::int64_t tokens = 0;
  std::int32_t heads = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;

  [[nodiscard]] const std::byte* row(std::int64_t token, std::int32_t head) const {
    return static_cast<const std::byte*>(data) +
           static_cast<std::int64_t>(size_of(dtype)) * (token * token_stride + head * head_stride);
  }
};

struct MutableRows {
  void* data = nullptr;
  DType dtype = DType::kF32;
  std::int64_t tokens = 0;
  std::int32_t heads = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;

  [[nodiscard]] std::byte* row(std::int64_t token, std::int32_t head) const {
    return static_cast<std::byte*>(data) +
           static_cast<std::int64_t>(size_of(dtype)) * (token * token_stride + head * head_stride);
  }
};

}  // namespace oscar
