// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "core/check.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/rows.hpp"

namespace oscar {
namespace {

std::string item(const char* name, std::int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

Status check_range(const std::string& name, std::int64_t value, std::int64_t low,
                   std::int64_t high) {
  if (value >= low && value <= high) return {};
  return invalid(name + " is " + std::to_string(value) + ", must be " + std::to_string(low) +
                 " to " + std::to_string(high));
}

// Some |x| is not at most kMaxInput. Magnitudes compare as signed integers, whose maximum every
// vector unit has.
template <typename Int>
bool any_above(const std::byte* row, int count, Int limit) {
  Int worst = 0;
  for (int i = 0; i < count; ++i) {
    Int bits;
    std::memcpy(&bits, row + static_cast<std::ptrdiff_t>(sizeof bits) * i, sizeof bits);
    worst = std::max(worst, static_cast<Int>(bits & std::numeric_limits<Int>::max()));
  }
  return worst > limit;
}

bool any_bad(const std::byte* row, DType dtype, int count) {
  if (dtype == DType::kF32) return any_above<std::int32_t>(row, count, 0x477fe000);  // 65504
  // The largest accepted magnitude: 65504 in fp16, 65280 (the next below it) in bf16.
  return any_above<std::int16_t>(row, count, dtype == DType::kF16 ? 0x7bff : 0x477f);
}

}  // namespace

Status check_present(const char* name, const void* pointer) {
  if (pointer != nullptr) return {};
  return invalid(std::string(name) + " is null");
}

Status check_layout(const Layout& layout) {
  if (!is_head_dim(layout.head_dim)) {
    return {StatusCode::kUnsupported, "head_dim is " + std::to_string(layout.head_dim) +
                                          ", must be a multiple of 16 from 32 to 256"};
  }
  if (!is_format(layout.format)) {
    return invalid("format has " + std::to_string(layout.format.k_bits) + "-bit K and " +
                   std::to_string(layout.format.v_bits) +
                   "-bit V codes, must be k2v2, k4v2 or k4v4");
  }
  OSCAR_TRY(check_range("kv_heads", layout.kv_heads, 1, 65536));
  OSCAR_TRY(check_range("window", layout.window, 0, 1 << 24));
  OSCAR_TRY(check_range("sinks", layout.sinks, 0, kTileTokens));
  if (layout.exact_blocks != 1 && layout.exact_blocks != 2 && layout.exact_blocks != 4) {
    return invalid("exact_blocks is " + std::to_string(layout.exact_blocks) +
                   ", must be 1, 2 or 4");
  }
  if (layout.exact_blocks == 4 && layout.sinks % 2 != 0) {
    return invalid("sinks is " + std::to_string(layout.sinks) +
                   ", must be even where exact_blocks is 4");
  }
  if (layout.page_tokens < kTileTokens || layout.page_tokens % kTileTokens != 0) {
    return invalid("page_tokens is " + std::to_string(layout.page_tokens) +
                   ", must be a positive multiple of 32");
  }
  return {};
}

Status check_batch(const Layout& layout, const CacheView& cache, const Batch& batch,
                   std::int64_t tokens) {
  OSCAR_TRY(check_range("batch.size", batch.size, 0, std::numeric_limits<std::int32_t>::max()));
  if (batch.size == 0 && tokens == 0) return {};
  OSCAR_TRY(check_present("batch.query_start", batch.query_start));
  OSCAR_TRY(check_present("cache.slot", cache.slot));
  OSCAR_TRY(check_present("cache.seq_len", cache.seq_len));
  OSCAR_TRY(check_present("cache.exact", cache.exact));
  if (cache.exact_stride != 0 && cache.exact_stride < layout.exact_block_bytes()) {
    return invalid("exact_stride is " + std::to_string(cache.exact_stride) +
                   ", must be 0 or at least " + std::to_string(layout.exact_block_bytes()));
  }
  OSCAR_TRY(check_range("query_start[0]", batch.query_start[0], 0, 0));
  for (int b = 0; b < batch.size; ++b) {
    OSCAR_TRY(check_range(item("query_start", b + 1), batch.query_start[b + 1],
                          batch.query_start[b], tokens));
    const std::int64_t new_tokens = batch.query_start[b + 1] - batch.query_start[b];
    OSCAR_TRY(check_range(item("seq_len", b), cache.seq_len[b], 0,
                          std::numeric_limits<std::int32_t>::max() - new_tokens));
    for (int i = b * layout.exact_blocks; i < (b + 1) * layout.exact_blocks; ++i) {
      OSCAR_TRY(check_range(item("slot", i), cache.slot[i], 0, cache.slots - 1));
    }
    if (cache.exact_from == nullptr) continue;
    // The open tile must be exact: it has no packed copy.
    const std::int64_t open = cache.seq_len[b] / kTileTokens * kTileTokens;
    OSCAR_TRY(check_range(item("exact_from", b), cache.exact_from[b], 0, open));
  }
  return check_range(item("query_start", batch.size), batch.query_start[batch.size], tokens,
                     tokens);
}

Status check_pages(const Layout& layout, const CacheView& cache, int b, std::int64_t tiles) {
  if (tiles == 0) return {};
  const std::int64_t needed = (tiles + layout.tiles_per_page() - 1) / layout.tiles_per_page();
  if (needed > cache.max_pages) {
    return {StatusCode::kOutOfRange, "block_table has " + std::to_string(cache.max_pages) +
                                         " pages a sequence, sequence " + std::to_string(b) +
                                         " needs " + std::to_string(needed)};
  }
  OSCAR_TRY(check_present("cache.block_table", cache.block_table));
  for (std::int64_t i = 0; i < needed; ++i) {
    const std::int32_t page = cache.block_table[b * cache.max_pages + i];
    if (page < 0 || page >= cache.num_pages) {
      return {StatusCode::kOutOfRange, "block_table[" + std::to_string(b) + "][" +
                                           std::to_string(i) + "] is " + std::to_string(page) +
                                           ", must be 0 to " + std::to_string(cache.num_pages - 1)};
    }
  }
  return check_present("cache.pages", cache.pages);
}

Status check_rows(const char* name, const ConstRows& rows, std::int64_t tokens,
                  std::int32_t heads) {
  if (rows.tokens != tokens || rows.heads != heads) {
    return invalid(std::string(name) + " has " + std::to_string(rows.tokens) + " tokens and " +
                   std::to_string(rows.heads) + " heads, must have " + std::to_string(tokens) +
                   " and " + std::to_string(heads));
  }
  return tokens == 0 ? Status() : check_present(name, rows.data);
}

Status check_finite(const char* name, const ConstRows& rows, int head_dim) {
  for (std::int64_t token = 0; token < rows.tokens; ++token) {
    for (int head = 0; head < rows.heads; ++head) {
      const std::byte* row = rows.row(token, head);
      if (!any_bad(row, rows.dtype, head_dim)) continue;
      float values[kMaxHeadDim];
      load_row(row, rows.dtype, head_dim, values);
      for (int c = 0; c < head_dim; ++c) {
        if (std::fabs(values[c]) <= kMaxInput) continue;  // false for NaN
        return invalid(std::string(name) + "[token " + std::to_string(token) + ", head " +
                       std::to_string(head) + ", channel " + std::to_string(c) + "] is " +
                       std::to_string(values[c]) +
                       ", must be finite and at most 65504 in magnitude");
      }
    }
  }
  return {};
}

Status check_balance(const Layout& layout, const CacheView& cache) {
  if (cache.balance == nullptr) return {};
  for (int i = 0; i < layout.kv_heads * layout.head_dim; ++i) {
    const float value = cache.balance[i];
    if (value >= 1.0f / kMaxBalance && value <= kMaxBalance) continue;
    return invalid("balance[head " + std::to_string(i / layout.head_dim) + ", channel " +
                   std::to_string(i % layout.head_dim) + "] is " + std::to_string(value) +
                   ", must be 1/64 to 64");
  }
  return {};
}

Status check_center(const Layout& layout, const CacheView& cache) {
  if (cache.center == nullptr) return {};
  for (int i = 0; i < layout.kv_heads * layout.head_dim; ++i) {
    const float value = cache.center[i];
    if (std::fabs(value) <= kMaxInput) continue;  // false for NaN
    return invalid("center[head " + std::to_string(i / layout.head_dim) + ", channel " +
                   std::to_string(i % layout.head_dim) + "] is " + std::to_string(value) +
                   ", must be finite and at most 65504 in magnitude");
  }
  return {};
}

Status check_query_heads(std::int32_t q_heads, std::int32_t kv_heads) {
  constexpr int kMaxGqa = 16;
  if (q_heads < kv_heads || q_heads % kv_heads != 0 || q_heads / kv_heads > kMaxGqa) {
    return invalid("q has " + std::to_string(q_heads) + " heads, must be 1 to 16 times the " +
                   std::to_string(kv_heads) + " KV heads");
  }
  return {};
}

Status check_attend_options(const AttendOptions& options) {
  if (!std::isfinite(options.scale)) {
    return invalid("scale is " + std::to_string(options.scale) + ", must be finite");
  }
  if (!std::isfinite(options.softcap) || options.softcap < 0) {
    return invalid("softcap is " + std::to_string(options.softcap) +
                   ", must be 0 (none) or positive");
  }
  if (options.sliding_window < 0) {
    return invalid("sliding_window is " + std::to_string(options.sliding_window) +
                   ", must be 0 (none) or positive");
  }
  return {};
}

Status check_scratch(const std::string& name, const void* memory, std::size_t bytes,
                     std::size_t needed, std::size_t alignment) {
  if (bytes < needed) {
    return invalid(name + "_bytes is " + std::to_string(bytes) + ", must be at least " +
                   std::to_string(needed));
  }
  if (needed > 0) OSCAR_TRY(check_present(name.c_str(), memory));
  if (reinterpret_cast<std::uintptr_t>(memory) % alignment != 0) {
    return invalid(name + " is not aligned to " + std::to_string(alignment) + " bytes");
  }
  return {};
}

}  // namespace oscar
