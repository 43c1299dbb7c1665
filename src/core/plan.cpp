// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
#include "core/plan.hpp"

#include <omp.h>

#include <algorithm>

namespace oscar {
namespace {

// Split items a thread: few enough to keep merging cheap, enough to even out unequal sequences.
constexpr std::int64_t kItemsPerThread = 4;
constexpr std::int64_t kMaxSplitItems = 512;
// A split below this reads less than it costs to merge.
constexpr std::int64_t kMinUnits = 8;
// Below this many units in all, starting threads costs more than they save.
constexpr std::int64_t kMinParallelUnits = 32;

constexpr std::int64_t kAlignment = 64;

constexpr std::int64_t align(std::int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

constexpr std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t slot_bytes(int head_dim, std::int64_t rows) {
  return std::min<std::int64_t>(rows, kRowBlock) * partial_row_floats(head_dim) *
         static_cast<std::int64_t>(sizeof(float));
}

std::int64_t row_blocks(const AttendCall& call, int b) {
  const std::int64_t tokens = call.batch.query_start[b + 1] - call.batch.query_start[b];
  return ceil_divide(tokens * (call.q.heads / call.layout.kv_heads), kRowBlock);
}

// Units of the last query of sequence b, which reads the most.
std::int64_t last_units(const AttendCall& call, int b) {
  const std::int64_t tokens = call.batch.query_start[b + 1] - call.batch.query_start[b];
  const std::int64_t visible = call.cache.seq_len[b] + tokens;
  const std::int64_t window = call.options.sliding_window;
  return ceil_divide(window > 0 ? std::min(window, visible) : visible, kTileTokens) + 1;
}

}  // namespace

std::int64_t partial_row_floats(int head_dim) { return (head_dim + 2 + 15) / 16 * 16; }

AttendItem AttendPlan::item(std::int64_t index) const {
  const PlannedSequence* after = std::upper_bound(
      sequences, sequences + batch_size, index,
      [](std::int64_t i, const PlannedSequence& sequence) { return i < sequence.first_item; });
  const PlannedSequence& sequence = after[-1];
  const std::int64_t within = index - sequence.first_item;
  const std::int64_t pair = within / sequence.splits;
  return {.b = static_cast<std::int32_t>(after - 1 - sequences),
          .kv_head = static_cast<std::int32_t>(pair / sequence.blocks),
          .block = static_cast<std::int32_t>(pair % sequence.blocks),
          .split = static_cast<std::int32_t>(within % sequence.splits),
          .splits = sequence.splits,
          .slot = sequence.first_slot + within};
}

AttendPlan plan_attend(const AttendCall& call) {
  const int kv_heads = call.layout.kv_heads;
  const std::int64_t most = omp_get_max_threads();
  std::int64_t units = 0;
  for (int b = 0; b < call.batch.size; ++b) {
    const std::int64_t blocks = row_blocks(call, b);
    if (blocks > 0) units += blocks * kv_heads * last_units(call, b);
  }
  const std::int64_t target =
      most == 1 ? 1 : std::min<std::int64_t>(kItemsPerThread * most, kMaxSplitItems);
  const std::int64_t share = std::max(ceil_divide(units, target), kMinUnits);

  AttendPlan plan;
  auto* sequences = reinterpret_cast<PlannedSequence*>(call.workspace.data());
  std::int64_t slots = 0;
  for (int b = 0; b < call.batch.size; ++b) {
    const std::int64_t blocks = row_blocks(call, b);
    const std::int64_t splits = blocks == 0 ? 1 : ceil_divide(last_units(call, b), share);
    sequences[b] = {plan.items, slots, static_cast<std::int32_t>(blocks),
                    static_cast<std::int32_t>(splits)};
    const std::int64_t items = blocks * kv_heads * splits;
    plan.items += items;
    if (splits > 1) slots += items;
    plan.split_sequences += splits > 1 ? 1 : 0;
  }
  const std::int64_t rows = call.q.tokens * (call.q.heads / kv_heads);
  plan.threads = static_cast<int>(units < kMinParallelUnits ? 1 : std::min(most, plan.items));
  plan.batch_size = call.batch.size;
  plan.sequences = sequences;
  plan.slot_bytes = slot_bytes(call.layout.head_dim, rows);
  plan.slots = call.workspace.data() +
               align(call.batch.size * static_cast<std::int64_t>(sizeof(PlannedSequence)));
  return plan;
}

// A sequence that is split has more than `share` units a block, so its splits, ceil(units / share),
// are fewer than twice units / share; all shares together are at most the target.
std::size_t attend_workspace_bytes(const Layout& layout, std::int32_t batch_size,
                                   std::int64_t query_tokens, std::int32_t q_heads) {
  if (batch_size <= 0 || query_tokens <= 0 || layout.kv_heads <= 0) return 0;
  const std::int64_t rows = query_tokens * (q_heads / layout.kv_heads);
  const std::int64_t table = batch_size * static_cast<std::int64_t>(sizeof(PlannedSequence));
  return static_cast<std::size_t>(align(table) +
                                  2 * kMaxSplitItems * slot_bytes(layout.head_dim, rows));
}

}  // namespace oscar
