// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Dense attention in float64, written from the documentation and on purpose without the code of
// src/reference: the codes are read by their bit positions, and every key and value is brought back
// to the original basis before it is used.
#pragma once

#include <vector>

#include "support.hpp"

namespace oscar::testing {

struct Expected {
  std::vector<double> out;  // [tokens, q_heads, head_dim]
  std::vector<double> lse;  // [tokens, q_heads]
};

// Exact tokens are taken from the fixture's own record, not from the ring.
Expected expected_attention(const CacheFixture& fixture, const Call& call, const Rows& q,
                            const AttendOptions& options);

// The same without any compression.
Expected exact_attention(const CacheFixture& fixture, const Call& call, const Rows& q,
                         const AttendOptions& options);

// k, v [head_dim] of token `position` from its tile, in the original basis.
void decode_token(const CacheFixture& fixture, int b, int kv_head, std::int64_t position,
                  std::vector<double>& k, std::vector<double>& v);

// |out - expected| / |expected| over the whole call, and the largest |lse - expected|.
double output_error(const Rows& out, const Expected& expected);
double lse_error(const std::vector<float>& lse, const Expected& expected);

}  // namespace oscar::testing
