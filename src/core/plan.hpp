// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// How attend is cut into work items for the threads of a CPU.
//
// An item is (sequence, KV head, row block, split). The rows of a KV head are the sequence's query
// tokens times the query heads that share it, kRowBlock of them a block. The tokens that a block
// reads are counted in units of 32 (packed tiles, then blocks of exact tokens) and cut into splits
// where there are fewer blocks than threads can share. A block with one split writes the output;
// the others leave a partial result in a slot of the workspace, and combine merges them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/calls.hpp"

namespace oscar {

inline constexpr int kRowBlock = 16;

struct PlannedSequence {
  std::int64_t first_item;
  std::int64_t first_slot;  // of the workspace, if splits > 1
  std::int32_t blocks;      // row blocks of one KV head
  std::int32_t splits;
};

struct AttendItem {
  std::int32_t b;
  std::int32_t kv_head;
  std::int32_t block;
  std::int32_t split;
  std::int32_t splits;
  std::int64_t slot;
};

struct AttendPlan {
  int threads = 1;
  std::int32_t batch_size = 0;
  std::int64_t items = 0;
  std::int64_t split_sequences = 0;
  const PlannedSequence* sequences = nullptr;  // [batch]
  std::byte* slots = nullptr;
  std::int64_t slot_bytes = 0;

  [[nodiscard]] AttendItem item(std::int64_t index) const;
};

// Writes `sequences` into the call's workspace; the rest of it are the slots.
AttendPlan plan_attend(const AttendCall& call);

// One slot: rows x (head_dim sums, running maximum, denominator), padded to a cache line a row.
std::int64_t partial_row_floats(int head_dim);

}  // namespace oscar
