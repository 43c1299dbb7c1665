// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Where a call's tokens come from and go to: sequences of a ragged batch, rows, ring, sinks, tiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/calls.hpp"
#include "oscar/cache.hpp"
#include "oscar/cuda.hpp"

namespace oscar::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

enum class Side : std::int32_t { kKey = 0, kValue = 1 };

// One sequence of a call: tokens cached .. end - 1 are rows first_row .. of k and v.
struct AppendSpan {
  int b;
  int cached;
  int first_row;
  int end;

  [[nodiscard]] __device__ int first_tile() const { return cached / kTileTokens; }
  [[nodiscard]] __device__ int tiles() const { return end / kTileTokens - first_tile(); }
};

__device__ inline AppendSpan append_span(const CudaAppendCall& call, int b) {
  const int cached = call.cache.seq_len[b];
  const int last = min(call.batch.query_start[b + 1], static_cast<int>(call.k.tokens));
  const int first = min(max(call.batch.query_start[b], 0), last);
  return {b, cached, first, cached + last - first};
}

// A call of `tokens` tokens has tokens / 32 + batch slots for completed tiles: those of sequence b
// start at slot query_start[b] / 32 + b, at least one more than it can complete.
__host__ __device__ constexpr std::int64_t tile_slots(std::int64_t tokens, std::int32_t batch) {
  return tokens / kTileTokens + batch;
}

// The sequence of a slot, found by a whole warp: 32 candidates a step. Its slots are first_slot ..
// next_slot - 1.
__device__ inline int sequence_of_slot(const Batch& batch, int slot, int* first_slot,
                                       int* next_slot) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int low = 0;
  int count = batch.size;
  while (count > 1) {
    const int step = (count + kWarp - 1) / kWarp;
    const int b = low + lane * step;
    const bool starts = lane * step < count && batch.query_start[b] / kTileTokens + b <= slot;
    const int before = max(__popc(__ballot_sync(kAllLanes, starts)) - 1, 0) * step;
    low += before;
    count = min(step, count - before);
  }
  *first_slot = batch.query_start[low] / kTileTokens + low;
  *next_slot = batch.query_start[low + 1] / kTileTokens + low + 1;
  return low;
}

__device__ inline int bytes_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

__device__ inline const std::byte* row_address(const ConstRows& rows, int token, int head) {
  return static_cast<const std::byte*>(rows.data) +
         bytes_of(rows.dtype) * (token * rows.token_stride + head * rows.head_stride);
}

// Row `row` (ring_row or sink_row) of sequence b in the exact memory, whose first slot is known.
__device__ inline std::byte* exact_address(const Layout& layout, const CacheView& cache, int b,
                                           int first_slot, Side side, int head, int row) {
  const ExactPlace place = exact_place(layout, static_cast<std::int32_t>(side), row);
  const std::int64_t slot =
      place.block == 0
          ? first_slot
          : cache.slot[static_cast<std::int64_t>(b) * layout.exact_blocks + place.block];
  const std::int64_t stride =
      cache.exact_stride == 0 ? layout.exact_block_bytes() : cache.exact_stride;
  const int index =
      (place.plane * layout.kv_heads + head) * static_cast<int>(layout.exact_block_rows()) +
      place.row;
  return static_cast<std::byte*>(cache.exact) + slot * stride +
         static_cast<std::int64_t>(index) * layout.head_dim * bytes_of(layout.exact_dtype);
}

__device__ inline std::byte* exact_address(const Layout& layout, const CacheView& cache, int b,
                                           Side side, int head, int row) {
  const int slot = cache.slot[static_cast<std::int64_t>(b) * layout.exact_blocks];
  return exact_address(layout, cache, b, slot, side, head, row);
}

// Tile `tile` of sequence b through the block table; null where the table has no page for it.
__device__ inline std::uint8_t* tile_address(const Layout& layout, const CacheView& cache, int b,
                                             int head, int tile) {
  const int per_page = layout.tiles_per_page();
  const int entry = tile / per_page;
  if (entry >= cache.max_pages) return nullptr;
  const std::int64_t page = cache.block_table[b * cache.max_pages + entry];
  if (page < 0 || page >= cache.num_pages) return nullptr;
  const std::int64_t index = (page * layout.kv_heads + head) * per_page + tile % per_page;
  return cache.pages + index * layout.tile().tile_bytes();
}

// Feedback weights [head_dim][head_dim] of a KV head, or null.
__device__ inline const std::uint16_t* head_feedback(const Layout& layout, const CacheView& cache,
                                                     int head) {
  if (cache.feedback == nullptr) return nullptr;
  return cache.feedback + static_cast<std::int64_t>(head) * layout.head_dim * layout.head_dim;
}

// Of a KV head, or null.
__device__ inline const float* head_center(const Layout& layout, const CacheView& cache, int head) {
  return cache.center == nullptr ? nullptr : cache.center + head * layout.head_dim;
}

// Row of token `token` (first .. end - 1 of the call, or an earlier one in the ring) with its
// dtype.
struct TokenRow {
  const std::byte* data;
  DType dtype;
};
__device__ inline TokenRow token_row(const CudaAppendCall& call, const AppendSpan& span, Side side,
                                     int head, int token) {
  const Layout& layout = call.layout;
  if (token < span.cached) {
    return {exact_address(layout, call.cache, span.b, side, head, ring_row(layout, token)),
            layout.exact_dtype};
  }
  const ConstRows& rows = side == Side::kKey ? call.k : call.v;
  return {row_address(rows, span.first_row + token - span.cached, head), rows.dtype};
}

// Largest magnitude of a dtype that append accepts.
__device__ inline float input_limit(DType dtype) {
  return dtype == DType::kBF16 ? 65280.0f : kMaxInput;
}

// x, or what stands for it if it is not finite or too large; then *bad.
__device__ inline float accepted(float x, float limit, bool* bad) {
  if (fabsf(x) <= limit) return x;
  *bad = true;
  return isnan(x) ? 0.0f : copysignf(limit, x);
}

// Rare, so not inlined: the kernels stay in the instruction cache.
__device__ __noinline__ inline void report_fault(std::uint64_t* fault, Side side, int head,
                                                 int token) {
  if (fault == nullptr) return;
  *reinterpret_cast<volatile std::uint64_t*>(fault) =
      fault_word({side == Side::kValue, head, token});
  __threadfence_system();
}

inline constexpr int kChunk = 8;  // elements: 16 bytes of a 16-bit dtype

__device__ inline void load_chunk(const std::byte* at, DType dtype, float (&x)[kChunk]) {
  if (dtype == DType::kF32) {
    const auto* from = reinterpret_cast<const float4*>(at);
    *reinterpret_cast<float4*>(x) = from[0];
    *reinterpret_cast<float4*>(x + 4) = from[1];
    return;
  }
  const uint4 raw = *reinterpret_cast<const uint4*>(at);
  const std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == DType::kBF16) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

__device__ inline void store_chunk(const float (&x)[kChunk], DType dtype, std::byte* at) {
  if (dtype == DType::kF32) {
    auto* to = reinterpret_cast<float4*>(at);
    to[0] = *reinterpret_cast<const float4*>(x);
    to[1] = *reinterpret_cast<const float4*>(x + 4);
    return;
  }
  std::uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == DType::kBF16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      words[i] = *reinterpret_cast<const std::uint32_t*>(&pair);
    } else {
      const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      words[i] = *reinterpret_cast<const std::uint32_t*>(&pair);
    }
  }
  *reinterpret_cast<uint4*>(at) = make_uint4(words[0], words[1], words[2], words[3]);
}

// x as it is after a store in dtype.
__device__ inline float through(float x, DType dtype) {
  if (dtype == DType::kBF16) return __bfloat162float(__float2bfloat16_rn(x));
  if (dtype == DType::kF16) return __half2float(__float2half_rn(x));
  return x;
}

// Copies tokens first .. last - 1 of the call into the ring (or the sinks), `stride` threads
// together, this one the `rank`-th.
__device__ inline void copy_rows(const CudaAppendCall& call, const AppendSpan& span, Side side,
                                 int head, int first, int last, bool sinks, int rank, int stride) {
  const Layout& layout = call.layout;
  const ConstRows& rows = side == Side::kKey ? call.k : call.v;
  const int chunks = layout.head_dim / kChunk;
  const float limit = input_limit(rows.dtype);
#pragma unroll 2
  for (int i = rank; i < (last - first) * chunks; i += stride) {
    const int token = first + i / chunks;
    const int at = i % chunks * kChunk;
    const int row = span.first_row + token - span.cached;
    float x[kChunk];
    load_chunk(row_address(rows, row, head) + at * bytes_of(rows.dtype), rows.dtype, x);
    bool bad = false;
#pragma unroll
    for (float& value : x) value = accepted(value, limit, &bad);
    if (bad) report_fault(call.fault, side, head, row);
    const int target = sinks ? sink_row(layout, token) : ring_row(layout, token);
    store_chunk(x, layout.exact_dtype,
                exact_address(layout, call.cache, span.b, side, head, target) +
                    at * bytes_of(layout.exact_dtype));
  }
}

// Of a long call only the newest rows stay in the ring, and the first ones in the sinks.
__device__ inline void remember(const CudaAppendCall& call, const AppendSpan& span, Side side,
                                int head, int rank, int stride) {
  const Layout& layout = call.layout;
  copy_rows(call, span, side, head, span.cached, min(span.end, layout.sinks), true, rank, stride);
  const int kept = max(span.cached, span.end - layout.ring_tokens());
  copy_rows(call, span, side, head, kept, span.end, false, rank, stride);
}

}  // namespace oscar::cuda
