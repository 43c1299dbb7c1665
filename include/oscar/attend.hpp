// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// attend: Q -> rotate -> attend -> combine -> O, on the packed codes.
//
//   score(t) = scale q . k_t;  if softcap > 0: softcap tanh(score / softcap)
//   out = sum_t exp(score(t) - lse) v_t,  lse = log(sum_t exp(score(t)) + [exp(sink_logit)])
//
// The query at position p sees tokens t <= p, and t > p - sliding_window where that is > 0.
// Tokens below `sinks`, the exact window and the tokens of this call are read exactly, all other
// tokens from the codes (packed_tiles in cache.hpp). A query that sees no token (impossible unless
// sliding_window cuts all) gives 0 and lse -infinity.
#pragma once

#include <cstddef>

#include "oscar/cache.hpp"
#include "oscar/status.hpp"

namespace oscar {

struct AttendOptions {
  float scale = 1.0f;                  // usually 1 / sqrt(head_dim)
  float softcap = 0.0f;                // 0: none
  std::int32_t sliding_window = 0;     // 0: none
  const float* sink_logits = nullptr;  // [q_heads] or null: one more softmax term without a value
  bool strict = false;  // the position rule also for this call's tokens (append kPack came before)
};

// Bytes of scratch memory `attend` needs for these shapes (a bound that reads no array).
std::size_t attend_workspace_bytes(const Layout& layout, std::int32_t batch_size,
                                   std::int64_t query_tokens, std::int32_t q_heads);

// q, out [query_start[batch.size], q_heads, head_dim]; k_new, v_new [same, kv_heads, head_dim];
// lse [tokens, q_heads] float32 or null, natural logarithm. q_heads is 1 to 16 times kv_heads;
// query head h reads KV head h / (q_heads / kv_heads). Reads the cache as it was before this
// call's tokens (attend, then append); with options.strict after append(..., kPack). Query i of
// sequence b is at position seq_len[b] + i and has k_new, v_new row i.
// Errors: before anything is written. workspace: attend_workspace_bytes, 64-byte aligned.
Status attend(const Layout& layout, const CacheView& cache, const Batch& batch, const ConstRows& q,
              const ConstRows& k_new, const ConstRows& v_new, const AttendOptions& options,
              const MutableRows& out, float* lse, void* workspace,
              std::size_t workspace_bytes) noexcept;

}  // namespace oscar
