// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// combine: the partial results of one query token and head, summed and rotated back, to its output
// row; by a warp of the block that has all of them, or of combine_items (attend_combine.cuh).
#pragma once

#include <cstdint>

#include "cuda/attend_query.cuh"
#include "cuda/attend_shape.cuh"
#include "cuda/plan_part.cuh"
#include "cuda/softmax.cuh"

namespace oscar::cuda {

// Running sums of one row. Of a whole head_dim lane l has the channels from kChannels l on, else
// l, l + 32, ...
template <class S>
struct RowSums {
  static constexpr int kChannels = S::kPad / 32;
  static constexpr int kLaneStep = S::kWhole ? kChannels : 1;  // channels between two lanes
  static constexpr int kOwnStep = S::kWhole ? 1 : 32;

  float max;
  float sum;
  float x[kChannels];

  __device__ static int channel(int lane, int k) { return kLaneStep * lane + kOwnStep * k; }
  __device__ void raise(float to) {
    const float factor = exp2_fast(max - fmaxf(max, to));
    max = fmaxf(max, to);
    sum *= factor;
#pragma unroll
    for (float& value : x) value *= factor;
  }
};

// kFar: written by another block.
template <class S, bool kFar>
__device__ inline void load_part(const float* from, int dim, int lane,
                                 float (&x)[RowSums<S>::kChannels]) {
  constexpr int kChannels = RowSums<S>::kChannels;
  const auto load = [](const auto* at) { return kFar ? __ldcg(at) : *at; };
  if constexpr (S::kWhole && kChannels == 2) {
    *reinterpret_cast<float2*>(x) = load(reinterpret_cast<const float2*>(from) + lane);
  } else if constexpr (S::kWhole) {
#pragma unroll
    for (int k = 0; k < kChannels; k += 4) {
      *reinterpret_cast<float4*>(x + k) =
          load(reinterpret_cast<const float4*>(from + kChannels * lane + k));
    }
  } else {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      x[k] = lane + 32 * k < dim ? load(from + lane + 32 * k) : 0.0f;
    }
  }
}

// One column of the results that a block's warps have of an item: in the shared memory of those in
// `members`, and in memory.
template <class S>
__device__ inline RowSums<S> merge_column(const CudaAttendCall& call, const DecodePlan& plan,
                                          const char* shared, unsigned members, const ItemEnd& end,
                                          int column, int lane) {
  constexpr int kWarps = S::warps(kArch);
  constexpr int kTogether = kWarps % 4 == 0 ? 4 : 6;
  constexpr int kStride = S::kWarpBytes / 4;
  constexpr int kChannels = RowSums<S>::kChannels;
  static_assert(kWarps + 2 <= 32 && kWarps % kTogether == 0);
  const int dim = S::head_dim(call);
  const auto* partials = reinterpret_cast<const float*>(shared);
  const int max_at = plan.slot_columns * dim + column;
  // Lane w: the weight of warp w, or of what is in memory.
  const unsigned used = members | static_cast<unsigned>(end.slots) << kWarps;
  const bool is_used = (used >> lane & 1) != 0;
  const float* own = lane < kWarps ? partials + lane * kStride
                                   : slot_of(call, plan, 2 * end.item + (lane - kWarps) % 2);
  const float max = is_used ? own[max_at] : kNothing;
  const float part = is_used ? own[max_at + plan.slot_columns] : 0.0f;
  RowSums<S> row{max_over_lanes(max), 0.0f, {}};
  const float weight = is_used ? exp2_fast(max - row.max) : 0.0f;
  row.sum = sum_over_lanes(weight * part);
  const auto add = [&](int w, const float (&x)[kChannels]) {
    const float factor = __shfl_sync(kFullWarp, weight, w);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) row.x[k] = fmaf(factor, x[k], row.x[k]);
  };
  // In the place of a warp that has no part the first that has one, with weight 0: it is finite.
  const int first = __ffs(static_cast<int>(members)) - 1;
#pragma unroll 1  // short code: it comes from memory, once
  for (int begin = 0; begin < kWarps && first >= 0; begin += kTogether) {
    float x[kTogether][kChannels];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int from = (members >> (begin + j) & 1) != 0 ? begin + j : first;
      load_part<S, false>(partials + from * kStride + column * dim, dim, lane, x[j]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) add(begin + j, x[j]);
  }
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind) {
    if ((end.slots >> kind & 1) == 0) continue;
    float x[kChannels];
    load_part<S, false>(slot_of(call, plan, 2 * end.item + kind) + column * dim, dim, lane, x);
    add(kWarps + kind, x);
  }
  return row;
}

template <class S>
__device__ inline void store_part(float* to, int dim, int lane,
                                  const float (&x)[RowSums<S>::kChannels]) {
  constexpr int kChannels = RowSums<S>::kChannels;
  if constexpr (S::kWhole && kChannels == 2) {
    reinterpret_cast<float2*>(to)[lane] = make_float2(x[0], x[1]);
  } else if constexpr (S::kWhole) {
#pragma unroll
    for (int k = 0; k < kChannels; k += 4) {
      *reinterpret_cast<float4*>(to + kChannels * lane + k) =
          make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      if (lane + 32 * k < dim) to[lane + 32 * k] = x[k];
    }
  }
}

template <class S>
__device__ inline void store_sums(const CudaAttendCall& call, const DecodePlan& plan, float* slot,
                                  int column, int lane, const RowSums<S>& row) {
  const int dim = S::head_dim(call);
  store_part<S>(slot + column * dim, dim, lane, row.x);
  if (lane == 0) {
    slot[plan.slot_columns * dim + column] = row.max;
    slot[plan.slot_columns * (dim + 1) + column] = row.sum;
  }
}

// Hadamard transform of a row, but for its norm.
template <class S>
__device__ inline void hadamard_row(int dim, int lane, float (&x)[RowSums<S>::kChannels]) {
  using Row = RowSums<S>;
  const int block = hadamard_block(dim);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    if (step * Row::kLaneStep >= block) continue;
    const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (float& value : x) value = fmaf(sign, value, __shfl_xor_sync(kFullWarp, value, step));
  }
#pragma unroll
  for (int step = 1; step < Row::kChannels; step *= 2) {
    if (step * Row::kOwnStep >= block) continue;
#pragma unroll
    for (int k = 0; k < Row::kChannels; ++k) {
      if ((k & step) != 0) continue;
      const float a = x[k];
      const float b = x[k + step];
      x[k] = a + b;
      x[k + step] = a - b;
    }
  }
}

// The signs and the norm of V's rotation: before the Hadamard transform, or after its inverse.
template <class S>
__device__ inline void flip_row(int dim, int lane, float (&x)[RowSums<S>::kChannels]) {
  using Row = RowSums<S>;
  const float norm = rsqrtf(static_cast<float>(hadamard_block(dim)));
  if constexpr (S::kWhole) {
    const int first = Row::channel(lane, 0);
    const std::uint32_t bits = sign_word<S::kPad / 32>(first / 32) >> first % 32;
#pragma unroll
    for (int k = 0; k < Row::kChannels; ++k) x[k] = flip_sign(x[k] * norm, bits, k);
  } else {
#pragma unroll
    for (int k = 0; k < Row::kChannels; ++k) {
      x[k] = flip_sign(x[k] * norm, sign_word<S::kPad / 32>(k), lane);
    }
  }
}

__device__ inline void store_element(float x, DType type, std::byte* row, int channel) {
  if (type == DType::kF32) {
    reinterpret_cast<float*>(row)[channel] = x;
  } else if (type == DType::kF16) {
    reinterpret_cast<__half*>(row)[channel] = __float2half_rn(x);
  } else {
    reinterpret_cast<__nv_bfloat16*>(row)[channel] = __float2bfloat16_rn(x);
  }
}

// The output of one query token and head.
template <class S>
__device__ inline void store_row(const CudaAttendCall& call, const DecodePlan& plan,
                                 const ItemEnd& end, int column, int lane, RowSums<S>& row) {
  const int dim = S::head_dim(call);
  const DecodeColumn at = column_of(plan, end.kv_head, end.queries, end.first_column, column);
  const int token = end.first_row + at.query;
  const int q_head = at.q_head;
  if (!at.used) return;
  if (call.options.sink_logits != nullptr) {
    const float logit = call.options.sink_logits[q_head] * kLog2E;
    row.raise(logit);
    row.sum += exp2_fast(logit - row.max);
  }
  hadamard_row<S>(dim, lane, row.x);
  flip_row<S>(dim, lane, row.x);
  const float inverse = row.sum > 0.0f ? 1.0f / row.sum : 0.0f;
  std::byte* to =
      static_cast<std::byte*>(call.out.data) +
      bytes_of(call.out.dtype) * (token * call.out.token_stride + q_head * call.out.head_stride);
#pragma unroll
  for (int k = 0; k < RowSums<S>::kChannels; ++k) {
    const int channel = RowSums<S>::channel(lane, k);
    if (S::kWhole || channel < dim) store_element(row.x[k] * inverse, call.out.dtype, to, channel);
  }
  if (call.lse != nullptr && lane == 0) {
    call.lse[static_cast<std::int64_t>(token) * call.q.heads + q_head] =
        row.sum > 0.0f ? kLn2 * (row.max + log2_fast(row.sum)) : -INFINITY;
  }
}

// A column of an item as far as the block has it: to the output if that is all, else to the block's
// slot of the item, for combine_items.
template <class S>
__device__ inline void finish_column(const CudaAttendCall& call, const DecodePlan& plan,
                                     const ItemEnd& end, int column, int lane, RowSums<S>& row) {
  if (end.done == end.units) {
    store_row(call, plan, end, column, lane, row);
  } else {
    const int slot = plan.merged + static_cast<int>(blockIdx.x) + end.item;
    store_sums(call, plan, slot_of(call, plan, slot), column, lane, row);
  }
}

}  // namespace oscar::cuda
