// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The end of a row: both sums to one, in the original basis; partial results of splits merged; the
// sink logit; division by the denominator.
#pragma once

#include <cmath>

#include "core/calls.hpp"
#include "core/plan.hpp"

namespace oscar::cpu {
namespace {

// A row's sum of values and its softmax state; also the layout of a row of a slot.
struct PartialRow {
  float* out;  // [head_dim], then maximum and denominator
  float max;
  float sum;
};

inline int padded_group(const TileLayout& layout) {
  return (layout.v_group_channels() + 15) / 16 * 16;
}

// Adds the rotated sums, turned back, to block.out.
inline void merge_rotated(const TileLayout& layout, RowBlock& block) {
  const int group = layout.v_group_channels();
  const int padded = padded_group(layout);
  for (int r = 0; r < block.rows; ++r) {
    alignas(64) float y[kMaxHeadDim];
    const float offset = reduce_add(load(block.offset[r]));
    for (int i = 0; i < layout.v_groups(); ++i) {
      for (int j = 0; j < group; ++j) {
        y[i * group + j] = block.out_rotated[r][i * padded + j] + offset;
      }
    }
    hadamard_row(y, block.head_dim);
    for (int c = 0; c < block.head_dim; c += kLanes) {
      store(block.out[r] + c,
            multiply_add(load(y + c), load(kSigns.at + c), load(block.out[r] + c)));
    }
  }
}

// Row r of a row block: query token and head of the call.
struct RowPlace {
  std::int64_t row;
  int q_head;
};

inline RowPlace place_of(const AttendCall& call, int b, int kv_head, std::int64_t index) {
  const int group = call.q.heads / call.layout.kv_heads;
  return {call.batch.query_start[b] + index / group,
          kv_head * group + static_cast<int>(index % group)};
}

inline void write_row(const AttendCall& call, const RowPlace& place, const PartialRow& partial) {
  float max = partial.max;
  float sum = partial.sum;
  float factor = 1.0f;
  if (call.options.sink_logits != nullptr) {
    const float sink = call.options.sink_logits[place.q_head] * kLog2E;
    const float higher = sink > max ? sink : max;
    if (higher > -kInfinity) {
      factor = max == -kInfinity ? 0.0f : std::exp2(max - higher);
      sum = sum * factor + std::exp2(sink - higher);
      max = higher;
    }
  }
  multiply(partial.out, call.layout.head_dim, sum == 0.0f ? 0.0f : factor / sum);
  std::byte* target = static_cast<std::byte*>(call.out.data) +
                      bytes_of(call.out.dtype) *
                          (place.row * call.out.token_stride + place.q_head * call.out.head_stride);
  store_floats(partial.out, call.out.dtype, call.layout.head_dim, target);
  if (call.lse != nullptr) {
    call.lse[place.row * call.q.heads + place.q_head] =
        sum == 0.0f ? -kInfinity : (max + std::log2(sum)) * kLn2;
  }
}

inline float* slot_row(const AttendPlan& plan, std::int64_t slot, int head_dim, int r) {
  return reinterpret_cast<float*>(plan.slots + slot * plan.slot_bytes) +
         r * partial_row_floats(head_dim);
}

inline void save_partial(const AttendPlan& plan, std::int64_t slot, const RowBlock& block, int r) {
  float* target = slot_row(plan, slot, block.head_dim, r);
  std::memcpy(target, block.out[r], sizeof(float) * static_cast<std::size_t>(block.head_dim));
  target[block.head_dim] = block.max[r];
  target[block.head_dim + 1] = reduce_add(load(block.sum[r]));
}

// Merges the splits of row r of an item with split 0 into the output.
inline void combine_row(const AttendCall& call, const AttendPlan& plan, const AttendItem& item,
                        int r) {
  const int head_dim = call.layout.head_dim;
  alignas(64) float out[kMaxHeadDim] = {};
  PartialRow merged{out, -kInfinity, 0.0f};
  for (int split = 0; split < item.splits; ++split) {
    const float max = slot_row(plan, item.slot + split, head_dim, r)[head_dim];
    merged.max = max > merged.max ? max : merged.max;
  }
  for (int split = 0; split < item.splits; ++split) {
    const float* part = slot_row(plan, item.slot + split, head_dim, r);
    if (part[head_dim + 1] == 0.0f) continue;
    const float factor = std::exp2(part[head_dim] - merged.max);
    merged.sum += factor * part[head_dim + 1];
    for (int c = 0; c < head_dim; c += kLanes) {
      store(out + c, multiply_add(splat(factor), load(part + c), load(out + c)));
    }
  }
  write_row(call, place_of(call, item.b, item.kv_head, std::int64_t{item.block} * kRowBlock + r),
            merged);
}

}  // namespace
}  // namespace oscar::cpu
