// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// A unit of exact tokens to fp16 MMA operands in shared memory: K [unit tokens, head_dim] and V
// transposed [head_dim, unit tokens], in natural order, in the original basis.
#pragma once

#include "cuda/extend_fill.cuh"

namespace oscar::cuda {

// Row of the exact copy of token t: of the sinks or the ring below `cached`, else of the call.
__device__ inline const std::byte* exact_source(const CudaAttendCall& call, const RowBlock& block,
                                                Side side, int t, DType& dtype) {
  if (t >= block.cached) {
    const ConstRows& rows = side == Side::kKey ? call.k_new : call.v_new;
    dtype = rows.dtype;
    return row_address(rows, block.first + t - block.cached, block.kv_head);
  }
  dtype = call.layout.exact_dtype;
  const int row = t < call.layout.sinks ? sink_row(call.layout, t) : ring_row(call.layout, t);
  return exact_address(call.layout, call.cache, block.b, side, block.kv_head, row);
}

// Eight rows by eight channels, transposed, to eight rows of V^T.
__device__ inline void store_transposed(const uint4 (&x)[8], int chunk, int octet,
                                        char* v_operand) {
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    std::uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4& a = x[2 * i];
      const uint4& b = x[2 * i + 1];
      out[i] = __byte_perm(c < 2   ? a.x
                           : c < 4 ? a.y
                           : c < 6 ? a.z
                                   : a.w,
                           c < 2   ? b.x
                           : c < 4 ? b.y
                           : c < 6 ? b.z
                                   : b.w,
                           c % 2 == 0 ? 0x5410u : 0x7632u);
    }
    *reinterpret_cast<uint4*>(v_operand + swizzled(8 * chunk + c, octet)) =
        make_uint4(out[0], out[1], out[2], out[3]);
  }
}

// fp16 of 16 bytes of a 16-bit dtype.
__device__ inline uint4 to_fp16(uint4 bits, DType dtype) {
  if (dtype == DType::kF16) return bits;
  std::uint32_t x[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (std::uint32_t& pair : x) {
    pair = as_bits(
        __floats2half2_rn(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)));
  }
  return make_uint4(x[0], x[1], x[2], x[3]);
}

// Eight channels from c on as fp16.
__device__ inline uint4 load_eight(const std::byte* row, DType dtype, int c) {
  if (dtype != DType::kF32) {
    return to_fp16(*reinterpret_cast<const uint4*>(row + 2 * c), dtype);
  }
  const float4 a = reinterpret_cast<const float4*>(row)[c / 4];
  const float4 b = reinterpret_cast<const float4*>(row)[c / 4 + 1];
  return make_uint4(as_bits(__floats2half2_rn(a.x, a.y)), as_bits(__floats2half2_rn(a.z, a.w)),
                    as_bits(__floats2half2_rn(b.x, b.y)), as_bits(__floats2half2_rn(b.z, b.w)));
}

// K of a unit of this call's own tokens: chunk thread % kChunks of every kStep-th row.
template <int kChunks, int kThreads>
__device__ inline void copy_keys(const std::byte* keys, std::int64_t stride, DType dtype, int count,
                                 int thread, char* k_operand) {
  constexpr int kStep = kThreads / kChunks;
  constexpr int kLoads = 4;  // in flight
  const int chunk = thread % kChunks;
  char* panel = k_operand + chunk / 8 * kUnitTokens * 128;
#pragma unroll
  for (int row = 0; row < kUnitTokens; row += kLoads * kStep) {
    uint4 x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int token = min(row + i * kStep + thread / kChunks, count - 1);
      x[i] = *reinterpret_cast<const uint4*>(keys + token * stride + 16 * chunk);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int token = row + i * kStep + thread / kChunks;
      *reinterpret_cast<uint4*>(panel + swizzled(token, chunk % 8)) = to_fp16(x[i], dtype);
    }
  }
}

// A unit of this call's own tokens in 16 bits: rows at a fixed distance, so that many loads of a
// thread are in flight at once. Rows from `count` on repeat the last one: they are masked.
template <int kPaddedDim, int kThreads>
__device__ inline void fill_call(const CudaAttendCall& call, const RowBlock& block, int first,
                                 int count, int thread, char* k_operand, char* v_operand) {
  constexpr int kChunks = kPaddedDim / 8;
  const int row = block.first + first - block.cached;
  const std::byte* keys = row_address(call.k_new, row, block.kv_head);
  const std::byte* values = row_address(call.v_new, row, block.kv_head);
  const int chunks = call.layout.head_dim / 8;
#pragma unroll
  for (int begin = 0; begin < 8 * kChunks; begin += kThreads) {
    const int octet = thread % 8;  // lanes of a store differ in their chunk: no bank conflict
    const int chunk = (begin + thread) / 8;
    uint4 x[8] = {};
    if (chunk < chunks) {
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const int token = min(8 * octet + t, count - 1);
        x[t] = *reinterpret_cast<const uint4*>(values + token * 2 * call.v_new.token_stride +
                                               16 * chunk);
      }
    }
    // K while V is on its way.
    if (begin == 0 && thread % kChunks < chunks) {
      copy_keys<kChunks, kThreads>(keys, 2 * call.k_new.token_stride, call.k_new.dtype, count,
                                   thread, k_operand);
    }
    if (chunk < chunks) {
#pragma unroll
      for (int t = 0; t < 8; ++t) x[t] = to_fp16(x[t], call.v_new.dtype);
      store_transposed(x, chunk, octet, v_operand);
    }
  }
}

// A unit of exact tokens [first, end), natural order, each from where its exact copy is.
template <int kPaddedDim, int kThreads, Fill kFill = Fill::kBoth>
__device__ inline void fill_exact(const CudaAttendCall& call, const RowBlock& block, int first,
                                  int end, int thread, char* k_operand, char* v_operand) {
  if (kFill == Fill::kBoth && first >= block.cached && call.k_new.dtype != DType::kF32 &&
      call.v_new.dtype != DType::kF32) {
    fill_call<kPaddedDim, kThreads>(call, block, first, end - first, thread, k_operand, v_operand);
    return;
  }
  const int chunks = call.layout.head_dim / 8;
  DType dtype;
#pragma unroll 1
  for (int i = thread; fills_keys(kFill) && i < kUnitTokens * chunks; i += kThreads) {
    const int token = i / chunks;
    const int chunk = i % chunks;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (first + token < end) {
      const std::byte* row = exact_source(call, block, Side::kKey, first + token, dtype);
      x = load_eight(row, dtype, 8 * chunk);
    }
    *reinterpret_cast<uint4*>(k_operand + chunk / 8 * kUnitTokens * 128 +
                              swizzled(token, chunk % 8)) = x;
  }
#pragma unroll 1
  for (int i = thread; fills_values(kFill) && i < 8 * chunks; i += kThreads) {
    uint4 x[8] = {};
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const int token = first + i % 8 * 8 + t;
      if (token >= end) continue;
      const std::byte* row = exact_source(call, block, Side::kValue, token, dtype);
      x[t] = load_eight(row, dtype, i / 8 * 8);
    }
    store_transposed(x, i / 8, i % 8, v_operand);
  }
}

}  // namespace oscar::cuda
