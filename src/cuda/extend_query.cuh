// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Q rows to fp16 operands in shared memory, in the original or in the rotated basis.
//
// A row is spread over the four lanes of a quad as MMA accumulators are: lane % 4 holds columns
// 8 n + 2 (lane % 4) + e as x[n][e].
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/extend_rows.cuh"

namespace oscar::cuda {

// Shared-memory operands are rows of 64 halves, 128 bytes, whose 16-byte chunks are exchanged so
// that 8 rows of a column of chunks lie in different banks (the 128-byte swizzle of wgmma). Rows of
// more than 64 halves continue in the next panel.
__device__ inline int swizzled(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Powers of two that keep fp16 operands inside their range: packed K
// and V are stored times 2^-2.
inline constexpr int kKeyShift = 2;
inline constexpr int kValueShift = 2;

// Walsh-Hadamard transform of the blocks of a row, without the factor 1 / sqrt(block).
template <int N>
__device__ inline void hadamard_quad(float (&x)[N][2], int block) {
  const int lane = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float a = x[n][0];
    x[n][0] = a + x[n][1];
    x[n][1] = a - x[n][1];
  }
#pragma unroll
  for (int d = 1; d <= 2; d *= 2) {
    const float sign = (lane & d) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[n][e] = fmaf(sign, x[n][e], __shfl_xor_sync(~0u, x[n][e], d));
      }
    }
  }
#pragma unroll
  for (int d = 1; d < N; d *= 2) {
    if (8 * d >= block) break;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if ((n & d) != 0) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float a = x[n][e];
        x[n][e] = a + x[n + d][e];
        x[n + d][e] = a - x[n + d][e];
      }
    }
  }
}

// Two neighbouring elements of a row.
__device__ inline float2 load_pair(const void* row, DType dtype, int c) {
  if (dtype == DType::kF32) return static_cast<const float2*>(row)[c / 2];
  const std::uint32_t bits = static_cast<const std::uint32_t*>(row)[c / 2];
  if (dtype == DType::kF16) return __half22float2(reinterpret_cast<const __half2&>(bits));
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
__device__ inline void store_pair(void* row, DType dtype, int c, float a, float b) {
  if (dtype == DType::kF32) {
    static_cast<float2*>(row)[c / 2] = make_float2(a, b);
  } else if (dtype == DType::kF16) {
    static_cast<__half2*>(row)[c / 2] = __floats2half2_rn(a, b);
  } else {
    static_cast<__nv_bfloat162*>(row)[c / 2] = __floats2bfloat162_rn(a, b);
  }
}

// The row times a head's center; both without what is behind head_dim.
template <int N>
__device__ inline float center_product(const float* center, int head_dim, const float (&x)[N][2]) {
  const int within = 2 * (static_cast<int>(threadIdx.x) % 4);
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (8 * n >= head_dim) break;
    const float2 pair = *reinterpret_cast<const float2*>(center + 8 * n + within);
    sum = fmaf(x[n][0], pair.x, fmaf(x[n][1], pair.y, sum));
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
}

// What products with a row of the operand are multiplied by to be scores, and what the center adds
// to these.
struct RowFactors {
  float multiplier;
  float center;
};

// Rows r0 .. r0 + 7 (r0 + lane / 4 each quad) of the block into the operand at `shared`, panels of
// `panel_rows` rows, each row times a power of two that makes its largest element 1 to 2. rotate:
// Q's rotation, and the order 0, 2, 1, 3 within each four channels in which packed keys come
// (extend_fill.cuh).
template <int N>
__device__ inline RowFactors load_query(const CudaAttendCall& call, const RowBlock& block, int r0,
                                        bool rotate, char* shared, int panel_rows) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int r = r0 + lane / 4;
  const int head_dim = call.layout.head_dim;
  const bool valid = r < block.rows;
  const std::byte* row =
      row_address(call.q, block.first + block.token(valid ? r : 0), block.head(valid ? r : 0));
  const float* balance = !rotate || call.cache.balance == nullptr
                             ? nullptr
                             : call.cache.balance + block.kv_head * head_dim;
  float x[N][2];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int c = 8 * n + 2 * (lane % 4);
    float2 pair = make_float2(0.0f, 0.0f);
    if (valid && c < head_dim) pair = load_pair(row, call.q.dtype, c);
    if (rotate && c < head_dim) {
      const float2 f = balance == nullptr ? make_float2(1.0f, 1.0f)
                                          : *reinterpret_cast<const float2*>(balance + c);
      pair.x *= channel_sign(c) * f.x;
      pair.y *= channel_sign(c + 1) * f.y;
    }
    x[n][0] = pair.x;
    x[n][1] = pair.y;
  }
  const int size = hadamard_block(head_dim);
  float unit = 1.0f;
  float center = 0.0f;
  if (rotate) {
    hadamard_quad(x, size);
    unit = rsqrtf(static_cast<float>(size));
    if (call.cache.center != nullptr) {
      center = call.options.scale * unit *
               center_product(call.cache.center + block.kv_head * head_dim, head_dim, x);
    }
  }
  float largest = 0.0f;
#pragma unroll
  for (int n = 0; n < N; ++n) largest = fmaxf(largest, fmaxf(fabsf(x[n][0]), fabsf(x[n][1])));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
  // 2^-e by its bits, with e kept where both it and its inverse are normal numbers.
  const std::uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 32u), 222u);
  const float sign = call.options.scale < 0.0f ? -1.0f : 1.0f;
  const float down = sign * __uint_as_float((254u - exponent) << 23);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int within = lane % 4;  // channels 2 within, + 1 of 8
    auto* panel = reinterpret_cast<__half*>(shared + n / 8 * panel_rows * 128 + swizzled(r, n % 8));
    if (rotate) {
      const int first = within / 2 * 4 + within % 2;  // 0, 2, 1, 3: channel 2 goes to place 1
      panel[first] = __float2half_rn(x[n][0] * down);
      panel[first + 2] = __float2half_rn(x[n][1] * down);
    } else {
      *reinterpret_cast<__half2*>(panel + 2 * within) =
          __floats2half2_rn(x[n][0] * down, x[n][1] * down);
    }
  }
  // Never 0, so that it leaves -infinity alone.
  return {fmaxf(fabsf(call.options.scale) * __uint_as_float(exponent << 23) * unit, 1e-30f),
          center};
}

}  // namespace oscar::cuda
