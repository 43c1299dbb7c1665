// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "oscar/append.hpp"

#include "core/backend_choice.hpp"
#include "core/calls.hpp"
#include "core/check.hpp"

namespace oscar {
namespace {

Status check(const AppendCall& call) {
  const Layout& layout = call.layout;
  OSCAR_TRY(check_layout(layout));
  OSCAR_TRY(check_rows("k", call.k, call.k.tokens, layout.kv_heads));
  OSCAR_TRY(check_rows("v", call.v, call.k.tokens, layout.kv_heads));
  OSCAR_TRY(check_batch(layout, call.cache, call.batch, call.k.tokens));
  OSCAR_TRY(check_balance(layout, call.cache));
  OSCAR_TRY(check_center(layout, call.cache));
  for (int b = 0; b < call.batch.size; ++b) {
    const std::int64_t cached = call.cache.seq_len[b];
    const std::int64_t added = call.batch.query_start[b + 1] - call.batch.query_start[b];
    const std::int64_t complete = (cached + added) / kTileTokens;
    // Pages are touched only where a tile completes; the remembering half touches none.
    if (call.part == AppendPart::kRemember || complete == cached / kTileTokens) continue;
    OSCAR_TRY(check_pages(layout, call.cache, b, complete));
  }
  OSCAR_TRY(check_finite("k", call.k, layout.head_dim));
  return check_finite("v", call.v, layout.head_dim);
}

}  // namespace

Status append(const Layout& layout, const CacheView& cache, const Batch& batch, const ConstRows& k,
              const ConstRows& v, AppendPart part) noexcept {
  const AppendCall call{layout, cache, batch, k, v, part};
  OSCAR_TRY(check(call));
  const BackendOps* backend = nullptr;
  OSCAR_TRY(choose_backend(backend));
  backend->append(call);
  return {};
}

}  // namespace oscar
