// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// append and attend on a CUDA device, in builds with OSCAR_CUDA. They mean what append.hpp and
// attend.hpp say and produce the same bytes, with these differences:
//   * Every array is in device memory: pages, exact, block_table, slot, seq_len, exact_from,
//     balance, feedback, query_start, rows, sink_logits, lse, workspace.
//   * The call only launches kernels on `stream` (a cudaStream_t of the current device): no host
//     synchronisation, no allocation. A CUDA graph may capture it and replay it with other contents
//     of seq_len, block_table, query_start and the rows.
//   * The host checks what it can see: layout, shapes, dtypes, head counts, null pointers. The
//     contents of the index arrays are the caller's duty: 0 <= slot < slots,
//     0 <= block_table < num_pages for every complete tile, query_start rising from 0 to the number
//     of tokens, balance 1/64 to 64. Kernels never loop longer than the arrays allow.
#pragma once

#include <cstddef>
#include <cstdint>

#include "oscar/append.hpp"
#include "oscar/attend.hpp"
#include "oscar/cache.hpp"
#include "oscar/status.hpp"

namespace oscar::cuda {

// Sequences with at most this many query tokens take the decode kernel, the others the extend
// kernels. Each skips the other's sequences on the device.
inline constexpr std::int32_t kMaxDecodeQueries = 8;

// A CUDA driver and at least one device are there.
bool available() noexcept;

// fault (or null): a 64-bit word that the device can write, in device or in pinned host memory.
// The host cannot refuse a NaN here, so a row with a value that is not finite or exceeds 65504 in
// magnitude is stored with that value as 0 (NaN) or the nearest allowed one, and *fault becomes
// fault_word(side, head, token) of one such row. A call never clears it.
Status append(const Layout& layout, const CacheView& cache, const Batch& batch, const ConstRows& k,
              const ConstRows& v, AppendPart part, void* stream,
              std::uint64_t* fault = nullptr) noexcept;

struct Fault {
  bool value = false;      // in v, else in k
  std::int32_t head = 0;   // KV head
  std::int32_t token = 0;  // row of k or v
};
// Never 0: bit 0 set, bit 1 for v, then 30 bits of head and 32 of token.
constexpr std::uint64_t fault_word(Fault fault) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(fault.token)) << 32 |
         static_cast<std::uint64_t>(static_cast<std::uint32_t>(fault.head)) << 2 |
         (fault.value ? 2u : 0u) | 1u;
}
constexpr Fault fault_of(std::uint64_t word) {
  return {(word & 2u) != 0, static_cast<std::int32_t>(word >> 2 & 0x3fffffffu),
          static_cast<std::int32_t>(word >> 32)};
}

// Bytes of scratch memory `attend` needs for these shapes on the current device.
// max_query_len: see attend.
std::size_t attend_workspace_bytes(const Layout& layout, std::int32_t batch_size,
                                   std::int64_t query_tokens, std::int32_t q_heads,
                                   std::int32_t max_query_len) noexcept;

// How a decode step is cut into work for the warps of `attend`. It follows from shapes, seq_len,
// query_start, slot and exact_from, not from what a layer holds: all layers of a step may share one
// (FlashAttention's scheduler metadata, FlashInfer's plan), and each then starts to read about 2 us
// earlier. Without one every call finds out by itself.
struct AttendPlan {
  void* memory = nullptr;  // as given to plan_attend
  // For what it was made; `attend` refuses it for anything else.
  Layout layout;
  std::int32_t batch_size = 0;
  std::int64_t query_tokens = 0;
  std::int32_t q_heads = 0;
  std::int32_t max_query_len = 0;
  std::int32_t sliding_window = 0;
  bool strict = false;
  std::int64_t max_pages = 0;
};

// Bytes of device memory that any plan needs on the current device.
std::size_t attend_plan_bytes() noexcept;

// Launches the kernel that writes a plan to `memory` (device, 256-byte aligned) and describes it in
// `plan`. It reads seq_len, query_start, slot and exact_from when it runs: launch it after their
// last change and before the step's first `attend`; captured with them in a CUDA graph it is right
// for every replay. Of options only sliding_window and strict matter.
Status plan_attend(const Layout& layout, const CacheView& cache, const Batch& batch,
                   std::int64_t query_tokens, std::int32_t q_heads, const AttendOptions& options,
                   void* memory, std::size_t memory_bytes, std::int32_t max_query_len, void* stream,
                   AttendPlan& plan) noexcept;

// max_query_len: no sequence has more query tokens than this in this call (0: the number of
// tokens). Up to kMaxDecodeQueries means decode launches alone. workspace: 256-byte aligned; its
// contents need no initialisation. plan: of plan_attend for this step, or null.
Status attend(const Layout& layout, const CacheView& cache, const Batch& batch, const ConstRows& q,
              const ConstRows& k_new, const ConstRows& v_new, const AttendOptions& options,
              const MutableRows& out, float* lse, void* workspace, std::size_t workspace_bytes,
              std::int32_t max_query_len, void* stream, const AttendPlan* plan = nullptr) noexcept;

}  // namespace oscar::cuda
