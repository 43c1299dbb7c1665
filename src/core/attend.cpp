// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "oscar/attend.hpp"

#include "core/backend_choice.hpp"
#include "core/calls.hpp"
#include "core/check.hpp"

namespace oscar {
namespace {

Status check(const AttendCall& call) {
  OSCAR_TRY(check_layout(call.layout));
  OSCAR_TRY(check_rows("q", call.q, call.q.tokens, call.q.heads));
  OSCAR_TRY(check_rows("k_new", call.k_new, call.q.tokens, call.layout.kv_heads));
  OSCAR_TRY(check_rows("v_new", call.v_new, call.q.tokens, call.layout.kv_heads));
  const ConstRows out{call.out.data, call.out.dtype, call.out.tokens, call.out.heads};
  OSCAR_TRY(check_rows("out", out, call.q.tokens, call.q.heads));
  OSCAR_TRY(check_query_heads(call.q.heads, call.layout.kv_heads));
  OSCAR_TRY(check_attend_options(call.options));
  OSCAR_TRY(check_batch(call.layout, call.cache, call.batch, call.q.tokens));
  OSCAR_TRY(check_balance(call.layout, call.cache));
  OSCAR_TRY(check_center(call.layout, call.cache));
  for (int b = 0; b < call.batch.size; ++b) {
    const std::int64_t added = call.batch.query_start[b + 1] - call.batch.query_start[b];
    const std::int64_t tokens = call.cache.seq_len[b] + (call.options.strict ? added : 0);
    OSCAR_TRY(check_pages(call.layout, call.cache, b, added > 0 ? tokens / kTileTokens : 0));
  }
  return check_scratch(
      "workspace", call.workspace.data(), call.workspace.size(),
      attend_workspace_bytes(call.layout, call.batch.size, call.q.tokens, call.q.heads), 64);
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
