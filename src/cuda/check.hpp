// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Argument checks that read no device memory.
#pragma once

#include <cstdint>

#include "oscar/cache.hpp"
#include "oscar/status.hpp"

namespace oscar::cuda {

// As check_rows, and data and strides that allow 16-byte accesses.
Status check_device_rows(const char* name, const ConstRows& rows, std::int64_t tokens,
                         std::int32_t heads);

// Null pointers, sizes and the alignment of pages, exact, center and feedback.
Status check_device_cache(const CacheView& cache, const Batch& batch, std::int64_t tokens);

// The error of the launches since the last call, if any.
Status launched(const char* operation);

}  // namespace oscar::cuda
