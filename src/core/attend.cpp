// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "oscar/attend.hpp"

#include <cmath>
#include <string>

#include "core/backend_choice.hpp"
#include "core/calls.hpp"
#include "core/check.hpp"

namespace oscar {
namespace {

constexpr int kMaxGqa = 16;

Status invalid(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }

Status check_heads(const AttendCall& call) {
  const std::int32_t q_heads = call.q.heads;
  const std::int32_t kv_heads = call.layout.kv_heads;
  if (q_heads < kv_heads || q_heads % kv_heads != 0 || q_heads / kv_heads > kMaxGqa) {
    return invalid("q has " + std::to_string(q_heads) + " heads, must be 1 to 16 times the " +
                   std::to_string(kv_heads) + " KV heads");
  }
  return {};
}

Status check_options(const AttendOptions& options) {
  if (!std::isfinite(options.scale)) {
    return invalid("scale is " + std::to_string(options.scale) + ", must be finite");
  }
  if (!std::isfinite(options.softcap) || options.softcap < 0) {
    return invalid("softcap is " + std::to_string(options.softcap) +
                   ", must be 0 (none) or positive");
  }
  if (options.sliding_window < 0) {
    return invalid("sliding_window is " + std::to_string(options.sliding_window) +
                   ", must be 0 (none) or positive");
  }
  return {};
}

Status check_workspace(const AttendCall& call) {
  const std::size_t needed =
      attend_workspace_bytes(call.layout, call.batch.size, call.q.tokens, call.q.heads);
  if (call.workspace.size() < needed) {
    return invalid("workspace_bytes is " + std::to_string(call.workspace.size()) +
                   ", must be at least " + std::to_string(needed));
  }
  if (needed > 0 && call.workspace.data() == nullptr) return invalid("workspace is null");
  if (reinterpret_cast<std::uintptr_t>(call.workspace.data()) % 64 != 0) {
    return invalid("workspace is not aligned to 64 bytes");
  }
  return {};
}

Status check(const AttendCall& call) {
  OSCAR_TRY(check_layout(call.layout));
  OSCAR_TRY(check_rows("q", call.q, call.q.tokens, call.q.heads));
  OSCAR_TRY(check_rows("k_new", call.k_new, call.q.tokens, call.layout.kv_heads));
  OSCAR_TRY(check_rows("v_new", call.v_new, call.q.tokens, call.layout.kv_heads));
  const ConstRows out{call.out.data, call.out.dtype, call.out.tokens, call.out.heads};
  OSCAR_TRY(check_rows("out", out, call.q.tokens, call.q.heads));
  OSCAR_TRY(check_heads(call));
  OSCAR_TRY(check_options(call.options));
  OSCAR_TRY(check_batch(call.layout, call.cache, call.batch, call.q.tokens));
  OSCAR_TRY(check_balance(call.layout, call.cache));
  for (int b = 0; b < call.batch.size; ++b) {
    const std::int64_t added = call.batch.query_start[b + 1] - call.batch.query_start[b];
    const std::int64_t tokens = call.cache.seq_len[b] + (call.options.strict ? added : 0);
    OSCAR_TRY(check_pages(call.layout, call.cache, b, added > 0 ? tokens / kTileTokens : 0));
  }
  return check_workspace(call);
}

}  // namespace

Status attend(const Layout& layout, const CacheView& cache, const Batch& batch, const ConstRows& q,
              const ConstRows& k_new, const ConstRows& v_new, const AttendOptions& options,
              const MutableRows& out, float* lse, void* workspace,
              std::size_t workspace_bytes) noexcept {
  const AttendCall call{
      layout, cache,   batch, q,   k_new,
      v_new,  options, out,   lse, {static_cast<std::byte*>(workspace), workspace_bytes}};
  OSCAR_TRY(check(call));
  const BackendOps* backend = nullptr;
  OSCAR_TRY(choose_backend(backend));
  if (q.tokens > 0) backend->attend(call);
  return {};
}

}  // namespace oscar
