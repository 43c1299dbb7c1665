// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The launches of decode attention for one format; each format is compiled by itself.
#pragma once

#include <algorithm>
#include <bit>
#include <climits>

#include "cuda/attend_combine.cuh"
#include "cuda/attend_decode.cuh"
#include "cuda/device.hpp"

namespace oscar::cuda {

struct Device {
  int multiprocessors = 1;
  int arch = 900;  // of the code that runs: a device also takes what was compiled for an older one
  int shared_bytes = 0;  // dynamic ones that a block of attend_decode may have
};

// The current one.
template <class S>
Device current_device() {
  cudaFuncAttributes code{};
  cudaFuncGetAttributes(&code, attend_decode<S>);
  return {multiprocessors(), code.ptxVersion >= 90 ? 900 : 800,
          most_shared_bytes() - static_cast<int>(code.sharedSizeBytes)};
}

// Query columns of an item: as few of 4, 8 and 16 as hold what a sequence has; registers have no
// room for 16 of more than 128 channels.
inline int item_columns(const Layout& layout, std::int32_t q_heads, std::int32_t max_query_len) {
  const int columns = q_heads / layout.kv_heads * std::min(max_query_len, kMaxDecodeQueries);
  if (columns <= 4) return 4;
  return columns > 8 && layout.head_dim <= 128 ? 16 : 8;
}

// Slots of an item's kinds, for any split of the tokens into sequences.
inline std::int64_t most_kinds(const Layout& layout, std::int32_t batch_size,
                               std::int64_t query_tokens, std::int32_t q_heads, int columns) {
  const std::int64_t group = q_heads / layout.kv_heads;
  const std::int64_t by_tokens = batch_size + query_tokens * group / columns;
  const std::int64_t each = (kMaxDecodeQueries * group + columns - 1) / columns;
  return 2 * layout.kv_heads * std::min(by_tokens, batch_size * each);
}

inline int slot_floats(const Layout& layout, int slot_columns) {
  return (slot_columns * (layout.head_dim + 2) + 3) / 4 * 4;
}

// Of few items a multiprocessor, fewer warps: memory is kept as busy by their tiles, and each waits
// less. Of many items a warp does one after the other, and others have to fill its pauses. Devices
// with less shared memory than that of S::warps (99 KiB from sm_86 on) have what fits there.
template <class S>
int block_warps(const CudaAttendCall& call, const Device& device) {
  const std::int64_t items = static_cast<std::int64_t>(call.batch.size) * call.layout.kv_heads;
  const int wanted = items > 2 * device.multiprocessors ? kMostDecodeWarps : 8;
  const int fit = std::max(device.shared_bytes / S::kWarpBytes, 1);
  return std::min({wanted, S::warps(device.arch), fit});
}

// The second kernel starts beside the first and waits for its end.
template <class S>
void launch_kernels(const CudaAttendCall& call, const DecodePlan& plan, const Device& device,
                    cudaStream_t stream) {
  const int shared = plan.block_warps * S::kWarpBytes;
  cudaFuncSetAttribute(attend_decode<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  attend_decode<S>
      <<<static_cast<unsigned>(plan.blocks), static_cast<unsigned>(32 * plan.block_warps),
         static_cast<std::size_t>(shared), stream>>>(call, plan);
  if (plan.blocks == 1) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks - 1));
  config.blockDim = dim3(static_cast<unsigned>(32 * std::min(plan.slot_columns, kCombineWarps)));
  config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = device.arch >= 900 ? 1 : 0;
  cudaLaunchKernelEx(&config, combine_items<S>, call, plan);
}

inline DecodeExact decode_exact(const Layout& layout, const CacheView& cache) {
  const int parts = layout.exact_blocks == 4 ? 2 : 1;
  DecodeExact exact{};
  exact.ring = layout.ring_tokens();
  exact.ring_inverse = static_cast<std::uint32_t>((1ull << 32) / static_cast<unsigned>(exact.ring));
  exact.ring_part = exact.ring / parts;
  exact.sink_part = layout.sinks / parts;
  exact.head_rows = static_cast<int>(layout.exact_block_rows());
  exact.row_bytes = layout.head_dim * static_cast<int>(size_of(layout.exact_dtype));
  exact.value_block = layout.exact_blocks / 2;
  if (layout.exact_blocks == 1) {
    exact.value_offset = static_cast<std::uint32_t>(layout.exact_block_bytes() / 2);
  }
  exact.stride = cache.exact_stride == 0 ? layout.exact_block_bytes() : cache.exact_stride;
  return exact;
}

template <class S>
DecodePlan host_plan(const CudaAttendCall& call, const Device& device) {
  DecodePlan plan{};
  plan.group = call.q.heads / call.layout.kv_heads;
  plan.group_inverse =
      ((1u << 16) + static_cast<unsigned>(plan.group) - 1) / static_cast<unsigned>(plan.group);
  plan.columns = S::kColumns;
  plan.column_shift = std::countr_zero(static_cast<unsigned>(S::kColumns));
  plan.block_warps = block_warps<S>(call, device);
  plan.blocks = device.multiprocessors;
  plan.slot_columns =
      std::min(S::kColumns, plan.group * std::min(call.max_query_len, kMaxDecodeQueries));
  plan.slot_floats = slot_floats(call.layout, plan.slot_columns);
  plan.merged = static_cast<int>(
      most_kinds(call.layout, call.batch.size, call.q.tokens, call.q.heads, S::kColumns));
  const int per_page = call.layout.tiles_per_page();
  plan.page_inverse = static_cast<std::uint32_t>(
      ((1ull << 32) + static_cast<unsigned>(per_page) - 1) / static_cast<unsigned>(per_page));
  plan.exact = decode_exact(call.layout, call.cache);
  const std::int64_t reach = call.cache.num_pages > 0 ? call.cache.max_pages * per_page : 0;
  plan.table_tiles = static_cast<int>(std::min<std::int64_t>(reach, INT_MAX));
  return plan;
}

enum class DecodeLaunch : std::uint8_t { kAttend, kPlan };

template <class S>
void launch(const CudaAttendCall& call, DecodeLaunch what, cudaStream_t stream) {
  const Device device = current_device<S>();
  const DecodePlan plan = host_plan<S>(call, device);
  if (what == DecodeLaunch::kPlan) return launch_plan_kernel(call, plan, stream);
  launch_kernels<S>(call, plan, device, stream);
}

template <int kKBits, int kVBits, int kDim, bool kAny>
void launch_dim(const CudaAttendCall& call, DecodeLaunch what, cudaStream_t stream) {
  const int columns = item_columns(call.layout, call.q.heads, call.max_query_len);
  if constexpr (kDim <= 128) {
    if (columns == 16)
      return launch<DecodeShape<kDim, kAny, kKBits, kVBits, 4>>(call, what, stream);
  }
  if (columns == 8) return launch<DecodeShape<kDim, kAny, kKBits, kVBits, 2>>(call, what, stream);
  launch<DecodeShape<kDim, kAny, kKBits, kVBits, 1>>(call, what, stream);
}

template <int kKBits, int kVBits>
void launch_decode_format(const CudaAttendCall& call, DecodeLaunch what, cudaStream_t stream) {
  switch (call.layout.head_dim) {
    case 64:
      return launch_dim<kKBits, kVBits, 64, false>(call, what, stream);
    case 96:
      return launch_dim<kKBits, kVBits, 96, false>(call, what, stream);
    case 128:
      return launch_dim<kKBits, kVBits, 128, false>(call, what, stream);
    case 256:
      return launch_dim<kKBits, kVBits, 256, false>(call, what, stream);
    default:
      break;
  }
  if (call.layout.head_dim < 128) return launch_dim<kKBits, kVBits, 128, true>(call, what, stream);
  launch_dim<kKBits, kVBits, 256, true>(call, what, stream);
}

}  // namespace oscar::cuda
