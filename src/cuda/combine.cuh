// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// combine: the partial results of one query token and head, packed ones rotated back, to its output
// row. By the warp, or a warp of the block, that did the last units of the item.
#pragma once

#include <cstdint>

#include "cuda/attend_query.cuh"
#include "cuda/attend_shape.cuh"
#include "cuda/plan.cuh"
#include "cuda/softmax.cuh"

namespace oscar::cuda {

// Whether `units` units of the item of `state`, whose results other warps may now read, are its
// last ones; asked by one lane.
template <class S>
__device__ inline bool add_units(const CudaAttendCall& call, const WarpState<S>& state, int units) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");  // for the tickets to be clear
#endif
  const int before = add_ordered(ticket_of(call, state.kind), units);
  return before + units == state.item.sequence.item_units();
}

// The slots of one kind of an item: those that blocks merged, then perhaps one of its last warp.
struct DecodeParts {
  int kind;
  int from;  // warps that merged, from .. last
  int last;
  int merged;  // blocks of these warps
  int count;   // slots
};

__device__ inline DecodeParts parts_of(const DecodePlan& plan, const DecodeLine& line, int kind,
                                       int units, int end, int from, int to) {
  if (units == 0) return {kind, 0, -1, 0, 0};
  // The last warp has gone on to other units: it left its part by itself.
  const bool own = line.start(to + 1) > end;
  const int last = own ? to - 1 : to;
  const int merged = last < from ? 0 : plan.block_of(last) - plan.block_of(from) + 1;
  return {kind, from, last, merged, merged + (own ? 1 : 0)};
}

// Slot of part i, or -1: of few units not every block between two has one.
__device__ inline int part_slot(const DecodePlan& plan, const DecodeLine& line,
                                const DecodeParts& parts, int i) {
  if (i >= parts.count) return -1;
  if (i >= parts.merged) return parts.kind;
  const int block = plan.block_of(parts.from) + i;
  const int first = max(parts.from, block * plan.block_warps);
  const int last = min(parts.last, (block + 1) * plan.block_warps - 1);
  return line.start(first) < line.start(last + 1) ? plan.merged + block + parts.kind : -1;
}

// The parts of one item.
struct ItemParts {
  DecodeParts exact;
  DecodeParts packed;
};

// Running sums of one row, packed parts still rotated. Of a whole head_dim lane l has the channels
// from kChannels l on, else l, l + 32, ...
template <int kChannels, bool kWhole>
struct RowSums {
  float max;
  float sum;
  float packed[kChannels];
  float exact[kChannels];

  __device__ static int channel(int lane, int k) {
    return kWhole ? kChannels * lane + k : lane + 32 * k;
  }
  __device__ void raise(float to) {
    const float factor = exp2_fast(max - fmaxf(max, to));
    max = fmaxf(max, to);
    sum *= factor;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      packed[k] *= factor;
      exact[k] *= factor;
    }
  }
};

template <int kChannels, bool kWhole>
__device__ inline void load_part(const float* from, int dim, int lane, float (&x)[kChannels]) {
  if constexpr (kWhole && kChannels == 2) {
    *reinterpret_cast<float2*>(x) = __ldcg(reinterpret_cast<const float2*>(from) + lane);
  } else if constexpr (kWhole) {
#pragma unroll
    for (int k = 0; k < kChannels; k += 4) {
      *reinterpret_cast<float4*>(x + k) =
          __ldcg(reinterpret_cast<const float4*>(from + kChannels * lane + k));
    }
  } else {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      x[k] = lane + 32 * k < dim ? __ldcg(from + lane + 32 * k) : 0.0f;
    }
  }
}

// Adds parts `first` .. + 31 of the packed and then the exact ones.
template <int kChannels, bool kWhole>
__device__ inline void add_parts(const CudaAttendCall& call, const DecodePlan& plan,
                                 const DecodeLine& line, const ItemParts& from, int column,
                                 int first, int lane, RowSums<kChannels, kWhole>& row) {
  constexpr int kTogether = 16 / kChannels;  // loads under way
  const int dim = call.layout.head_dim;
  const int index = first + lane;
  const bool is_packed = index < from.packed.count;
  const DecodeParts& packed_parts = from.packed;
  const DecodeParts& exact_parts = from.exact;
  const DecodeParts parts{is_packed ? packed_parts.kind : exact_parts.kind,
                          is_packed ? packed_parts.from : exact_parts.from,
                          is_packed ? packed_parts.last : exact_parts.last,
                          is_packed ? packed_parts.merged : exact_parts.merged,
                          is_packed ? packed_parts.count : exact_parts.count};
  const int own = part_slot(plan, line, parts, is_packed ? index : index - from.packed.count);
  const float* slot = slot_of(call, plan, own);
  const float most = own >= 0 ? __ldcg(slot + plan.slot_columns * dim + column) : kNothing;
  const float sum = own >= 0 ? __ldcg(slot + plan.slot_columns * (dim + 1) + column) : 0.0f;
  // A part that is not there has weight 0; in its place some other part is read, which is finite.
  const unsigned there = __ballot_sync(kFullWarp, own >= 0);
  if (there == 0) return;
  const int known = __shfl_sync(kFullWarp, own, __ffs(static_cast<int>(there)) - 1);
  const std::uint32_t offset = static_cast<std::uint32_t>(own >= 0 ? own : known) *
                                   static_cast<std::uint32_t>(plan.slot_floats) +
                               static_cast<std::uint32_t>(column * dim);
  const int count = min(from.packed.count + from.exact.count - first, 32);
  const int split = max(from.packed.count - first, 0);
  float x[kTogether][kChannels];
  const auto load = [&](int begin) {
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const std::uint32_t at = __shfl_sync(kFullWarp, offset, min(begin + j, count - 1));
      load_part<kChannels, kWhole>(slots_of(call, plan) + at, dim, lane, x[j]);
    }
  };
  load(0);  // beside the maxima
  row.raise(max_over_lanes(most));
  const float weight = own >= 0 ? exp2_fast(most - row.max) : 0.0f;
  row.sum += sum_over_lanes(weight * sum);
#pragma unroll 1
  for (int begin = 0; begin < count; begin += kTogether) {
    if (begin > 0) load(begin);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int i = begin + j;
      const float part = __shfl_sync(kFullWarp, weight, min(i, count - 1));
      const float packed = i < min(split, count) ? part : 0.0f;
      const float exact = i >= split && i < count ? part : 0.0f;
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        row.packed[k] = fmaf(packed, x[j][k], row.packed[k]);
        row.exact[k] = fmaf(exact, x[j][k], row.exact[k]);
      }
    }
  }
}

// The inverse of V's rotation: Hadamard, then the signs.
template <int kChannels, bool kWhole>
__device__ inline void unrotate(int dim, int lane, float (&x)[kChannels]) {
  using Row = RowSums<kChannels, kWhole>;
  const int block = hadamard_block(dim);
  constexpr int kLaneStep = kWhole ? kChannels : 1;  // channels between two lanes
  constexpr int kOwnStep = kWhole ? 1 : 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    if (step * kLaneStep >= block) continue;
    const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (float& value : x) value = fmaf(sign, value, __shfl_xor_sync(kFullWarp, value, step));
  }
#pragma unroll
  for (int step = 1; step < kChannels; step *= 2) {
    if (step * kOwnStep >= block) continue;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      if ((k & step) != 0) continue;
      const float a = x[k];
      const float b = x[k + step];
      x[k] = a + b;
      x[k + step] = a - b;
    }
  }
  const float norm = rsqrtf(static_cast<float>(block));
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const int channel = Row::channel(lane, k);
    x[k] = flip_sign(x[k] * norm, sign_word<kChannels>(channel / 32), channel % 32);
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

template <int kChannels, bool kWhole>
__device__ inline void store_row(const CudaAttendCall& call, int token, int q_head, int lane,
                                 RowSums<kChannels, kWhole>& row) {
  if (call.options.sink_logits != nullptr) {
    const float logit = call.options.sink_logits[q_head] * kLog2E;
    row.raise(logit);
    row.sum += exp2_fast(logit - row.max);
  }
  unrotate<kChannels, kWhole>(call.layout.head_dim, lane, row.packed);
  const float inverse = row.sum > 0.0f ? 1.0f / row.sum : 0.0f;
  std::byte* to =
      static_cast<std::byte*>(call.out.data) +
      bytes_of(call.out.dtype) * (token * call.out.token_stride + q_head * call.out.head_stride);
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const int channel = RowSums<kChannels, kWhole>::channel(lane, k);
    if (kWhole || channel < call.layout.head_dim) {
      store_element((row.packed[k] + row.exact[k]) * inverse, call.out.dtype, to, channel);
    }
  }
  if (call.lse != nullptr && lane == 0) {
    call.lse[static_cast<std::int64_t>(token) * call.q.heads + q_head] =
        row.sum > 0.0f ? kLn2 * (row.max + log2_fast(row.sum)) : -INFINITY;
  }
}

template <class S>
__device__ inline ItemParts find_parts(const DecodePlan& plan, const WarpState<S>& state,
                                       int lane) {
  const DecodeSequence& s = state.item.sequence;
  const DecodeLine& line = state.line;
  const int unit = state.next - state.units - state.begin;  // first of the item
  const int middle = unit + s.exact_units;
  const int end = middle + s.packed_units;
  const int kind = state.kind / 2 * 2;
  // The warps of four units, a lane each. A kind without units has no first or last one: any unit
  // will do.
  const int which = lane % 4;
  const int edge = which == 0 ? unit : which == 1 ? middle - 1 : which == 2 ? middle : end - 1;
  const int owner = line.owner(min(max(edge, 0), line.units - 1));
  return {parts_of(plan, line, kind, s.exact_units, middle, __shfl_sync(kFullWarp, owner, 0),
                   __shfl_sync(kFullWarp, owner, 1)),
          parts_of(plan, line, kind + 1, s.packed_units, end, __shfl_sync(kFullWarp, owner, 2),
                   __shfl_sync(kFullWarp, owner, 3))};
}

// The output of query column `column` of the item of `state`, if there is such a column.
template <class S>
__device__ inline void combine_column(const CudaAttendCall& call, const DecodePlan& plan,
                                      const WarpState<S>& state, int column) {
  constexpr int kChannels = S::kPad / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const DecodeColumn at = column_of(plan, state.item, column);
  if (!at.used) return;
  const ItemParts parts = find_parts(plan, state, lane);
  RowSums<kChannels, S::kWhole> row{kNothing, 0.0f, {}, {}};
#pragma unroll 1
  for (int first = 0; first < parts.packed.count + parts.exact.count; first += 32) {
    add_parts(call, plan, state.line, parts, column, first, lane, row);
  }
  store_row(call, state.item.sequence.first_row + at.query, at.q_head, lane, row);
}

}  // namespace oscar::cuda
