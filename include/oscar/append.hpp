// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// append: K,V -> rotate -> scale -> quantize -> pack -> page, and the exact copy into ring and
// sinks.
#pragma once

#include "oscar/cache.hpp"
#include "oscar/status.hpp"

namespace oscar {

// The two halves of append. kPack writes the tiles that this call completes (tokens from the ring
// and from k, v); kRemember writes the new rows into the ring and the sinks.
enum class AppendPart { kBoth, kPack, kRemember };

// Appends k, v [query_start[batch.size], kv_heads, head_dim] (after RoPE; float32, float16 or
// bfloat16, finite, |x| <= 65504). seq_len is read, never written: the caller adds the new tokens.
// A row is converted to exact_dtype before anything else, so the packed bytes do not depend on
// whether a token came through the ring. Pages of two sequences that this call completes must be
// distinct. Errors leave every byte as it was. Host arrays; returns when done; thread-safe for
// disjoint sequences.
Status append(const Layout& layout, const CacheView& cache, const Batch& batch, const ConstRows& k,
              const ConstRows& v, AppendPart part = AppendPart::kBoth) noexcept;

}  // namespace oscar
