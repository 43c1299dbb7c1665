// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "cuda/check.hpp"

#include <cuda_runtime_api.h>

#include <limits>
#include <string>

#include "core/check.hpp"
#include "oscar/cuda.hpp"

namespace oscar::cuda {
namespace {

constexpr std::int64_t kAccessBytes = 16;  // rows are read and written in vectors of this size

Status check_aligned(const char* name, const void* pointer, std::uintptr_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0) return {};
  return invalid(std::string(name) + " is not aligned to " + std::to_string(bytes) + " bytes");
}

Status check_stride(const char* name, const char* axis, std::int64_t stride, DType dtype) {
  if (stride * static_cast<std::int64_t>(size_of(dtype)) % kAccessBytes == 0) return {};
  return invalid(std::string(name) + " has stride " + std::to_string(stride) + " between " + axis +
                 ", must be a multiple of " +
                 std::to_string(kAccessBytes / static_cast<std::int64_t>(size_of(dtype))));
}

}  // namespace

bool available() noexcept {
  int count = 0;
  const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  if (!found) (void)cudaGetLastError();  // or the next launch would be blamed for it
  return found;
}

Status check_device_rows(const char* name, const ConstRows& rows, std::int64_t tokens,
                         std::int32_t heads) {
  OSCAR_TRY(check_rows(name, rows, tokens, heads));
  if (tokens > std::numeric_limits<std::int32_t>::max()) {
    return invalid(std::string(name) + " has " + std::to_string(tokens) +
                   " tokens, must be at most 2147483647");
  }
  OSCAR_TRY(check_aligned(name, rows.data, kAccessBytes));
  if (tokens > 1) OSCAR_TRY(check_stride(name, "tokens", rows.token_stride, rows.dtype));
  if (heads > 1) OSCAR_TRY(check_stride(name, "heads", rows.head_stride, rows.dtype));
  return {};
}

Status check_device_cache(const CacheView& cache, const Batch& batch, std::int64_t tokens) {
  if (batch.size < 0) {
    return invalid("batch.size is " + std::to_string(batch.size) + ", must be 0 or more");
  }
  if (batch.size == 0 && tokens > 0) {
    return invalid("batch.size is 0, must be at least 1 for " + std::to_string(tokens) + " tokens");
  }
  if (batch.size == 0) return {};
  OSCAR_TRY(check_present("batch.query_start", batch.query_start));
  OSCAR_TRY(check_present("cache.slot", cache.slot));
  OSCAR_TRY(check_present("cache.seq_len", cache.seq_len));
  OSCAR_TRY(check_present("cache.exact", cache.exact));
  OSCAR_TRY(check_aligned("cache.exact", cache.exact, kAccessBytes));
  if (cache.exact_stride % kAccessBytes != 0) {
    return invalid("cache.exact_stride is " + std::to_string(cache.exact_stride) +
                   ", must be a multiple of " + std::to_string(kAccessBytes));
  }
  OSCAR_TRY(check_aligned("cache.pages", cache.pages, 32));
  OSCAR_TRY(check_aligned("cache.center", cache.center, kAccessBytes));
  OSCAR_TRY(check_aligned("cache.feedback", cache.feedback, kAccessBytes));
  if (cache.max_pages > 0) OSCAR_TRY(check_present("cache.block_table", cache.block_table));
  // A zero-sized pool may have no address: then no tile can complete.
  if (cache.num_pages > 0) OSCAR_TRY(check_present("cache.pages", cache.pages));
  return {};
}

Status launched(const char* operation) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {StatusCode::kDeviceError,
          std::string(operation) + ": CUDA reports " + cudaGetErrorString(error)};
}

}  // namespace oscar::cuda
