// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// combine: softmax sums over parts of the tokens, kept so that two of them can be merged.
#pragma once

#include "oscar/format.hpp"

namespace oscar::reference {

// out = sum exp(score - max) v, sum = sum exp(score - max) over the tokens so far; none at start.
struct Partial {
  double max = 0.0;  // without meaning while sum is 0
  double sum = 0.0;
  double out[kMaxHeadDim] = {};
};

// Adds one token: v [head_dim], or null for a sink logit.
void add_token(int head_dim, double score, const double* v, Partial& partial);

// target = the sums over both parts' tokens.
void merge(int head_dim, const Partial& part, Partial& target);

// out [head_dim] = the weighted mean; returns log sum exp(score). Without tokens: 0, -infinity.
double finish(int head_dim, const Partial& partial, double* out);

}  // namespace oscar::reference
