// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// attend for sequences with more query tokens than the decode path takes: chunks of a prompt,
// further turns of a conversation.
#include <algorithm>

#include "cuda/device.hpp"
#include "cuda/extend_launch.hpp"
#include "cuda/extend_mma.cuh"

namespace oscar::cuda {
namespace {

constexpr int kBlockRows = 128;
constexpr int kSmallBlockRows = 64;  // where kBlockRows do not fit

int block_rows(const Layout& layout) {
  const bool fits = layout.head_dim <= 128 || has_extend_sm90(layout) ||
                    MmaShape<256, kBlockRows>::shared_bytes(layout.tile()) <= most_shared_bytes();
  return fits ? kBlockRows : kSmallBlockRows;
}

// Row blocks of one KV head: a bound from what the host knows.
int row_blocks(std::int32_t batch_size, std::int64_t query_tokens, int group,
               std::int32_t max_query_len, int rows) {
  const std::int64_t by_tokens = batch_size + query_tokens * group / rows;
  const std::int64_t each = (static_cast<std::int64_t>(max_query_len) * group + rows - 1) / rows;
  return static_cast<int>(std::min(by_tokens, batch_size * each));
}

// The kernel for sm_90 keeps a multiprocessor busy with one block.
int blocks_per_multiprocessor(const Layout& layout) {
  return layout.head_dim > 128 || has_extend_sm90(layout) ? 1 : 2;
}

// The tokens of a block are split where the blocks would leave multiprocessors idle: the fewest
// splits that fill 85 % of the last wave, or the best if none does.
Splits choose_splits(const Layout& layout, int rows, std::int32_t batch_size,
                     std::int64_t query_tokens, std::int32_t q_heads, std::int32_t max_query_len) {
  Splits splits;
  splits.blocks =
      row_blocks(batch_size, query_tokens, q_heads / layout.kv_heads, max_query_len, rows);
  const std::int64_t slots =
      static_cast<std::int64_t>(multiprocessors()) * blocks_per_multiprocessor(layout);
  const std::int64_t blocks = static_cast<std::int64_t>(splits.blocks) * layout.kv_heads;
  double best = 0.0;
  for (int count = 1; count == 1 || (count * blocks <= 2 * slots && count <= 64); ++count) {
    const std::int64_t waves = (count * blocks + slots - 1) / slots;
    const double used = static_cast<double>(count * blocks) / static_cast<double>(waves * slots);
    if (used > best + 0.02) {
      best = used;
      splits.count = count;
    }
    if (best >= 0.85) break;
  }
  return splits;
}

template <class Shape, bool kFull>
void launch(const CudaAttendCall& call, const Splits& splits, cudaStream_t stream) {
  const int shared = Shape::shared_bytes(call.layout.tile());
  cudaFuncSetAttribute(extend_mma<Shape, kFull>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       shared);
  const dim3 grid(static_cast<unsigned>(splits.blocks * splits.count),
                  static_cast<unsigned>(call.layout.kv_heads));
  extend_mma<Shape, kFull><<<grid, Shape::kThreads, shared, stream>>>(call, splits);
}

template <int kPaddedDim, int kRows>
void launch(const CudaAttendCall& call, const Splits& splits, cudaStream_t stream) {
  using Shape = MmaShape<kPaddedDim, kRows>;
  if (call.layout.head_dim == kPaddedDim) {
    launch<Shape, true>(call, splits, stream);
  } else {
    launch<Shape, false>(call, splits, stream);
  }
}

template <int kRows>
void combine(const CudaAttendCall& call, const Splits& splits, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(splits.blocks), static_cast<unsigned>(call.layout.kv_heads),
                  4);
  combine_extend<kRows><<<grid, 256, 0, stream>>>(call, splits);
}

}  // namespace

std::size_t extend_workspace_bytes(const Layout& layout, std::int32_t batch_size,
                                   std::int64_t query_tokens, std::int32_t q_heads,
                                   std::int32_t max_query_len) {
  if (batch_size <= 0 || layout.kv_heads <= 0 || q_heads < layout.kv_heads) return 0;
  const int rows = block_rows(layout);
  const Splits splits =
      choose_splits(layout, rows, batch_size, query_tokens, q_heads, max_query_len);
  if (splits.count == 1) return 0;
  return static_cast<std::size_t>(splits.blocks) * splits.count * layout.kv_heads * rows *
         (layout.head_dim + 2) * sizeof(float);
}

void launch_attend_extend(const CudaAttendCall& call, cudaStream_t stream) {
  const int rows = block_rows(call.layout);
  const Splits splits = choose_splits(call.layout, rows, call.batch.size, call.q.tokens,
                                      call.q.heads, call.max_query_len);
  if (launch_extend_sm90(call, splits, stream)) {
    // done
  } else if (call.layout.head_dim <= 64) {
    launch<64, kBlockRows>(call, splits, stream);
  } else if (call.layout.head_dim <= 128) {
    launch<128, kBlockRows>(call, splits, stream);
  } else if (rows == kBlockRows) {
    launch<256, kBlockRows>(call, splits, stream);
  } else {
    launch<256, kSmallBlockRows>(call, splits, stream);
  }
  if (splits.count == 1) return;
  if (rows == kBlockRows) {
    combine<kBlockRows>(call, splits, stream);
  } else {
    combine<kSmallBlockRows>(call, splits, stream);
  }
}

}  // namespace oscar::cuda
