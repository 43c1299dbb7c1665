// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Argument checks shared by append and attend. Each returns the first thing that is wrong, with the
// name of the argument, its value and the limit.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include "oscar/attend.hpp"
#include "oscar/cache.hpp"
#include "oscar/status.hpp"

namespace oscar {

inline Status invalid(std::string message) {
  return {StatusCode::kInvalidArgument, std::move(message)};
}

Status check_present(const char* name, const void* pointer);

Status check_layout(const Layout& layout);

// query_start rises from 0 and ends at `tokens`; seq_len, slot, exact_from are in range.
Status check_batch(const Layout& layout, const CacheView& cache, const Batch& batch,
                   std::int64_t tokens);

// Every block-table entry of the first `tiles` tiles of sequence `b` names an existing page.
Status check_pages(const Layout& layout, const CacheView& cache, int b, std::int64_t tiles);

Status check_rows(const char* name, const ConstRows& rows, std::int64_t tokens, std::int32_t heads);

// All elements are finite and at most kMaxInput in magnitude.
Status check_finite(const char* name, const ConstRows& rows, int head_dim);

// All elements of balance are finite and positive.
Status check_balance(const Layout& layout, const CacheView& cache);

// All elements of center are finite and at most kMaxInput in magnitude.
Status check_center(const Layout& layout, const CacheView& cache);

// 1 to 16 query heads for each KV head.
Status check_query_heads(std::int32_t q_heads, std::int32_t kv_heads);

Status check_attend_options(const AttendOptions& options);

// Memory that the caller lends: arguments `name` and `name`_bytes.
Status check_scratch(const std::string& name, const void* memory, std::size_t bytes,
                     std::size_t needed, std::size_t alignment);

}  // namespace oscar
