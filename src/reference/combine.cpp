// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
#include "reference/combine.hpp"

#include <cmath>
#include <limits>

namespace oscar::reference {
namespace {

// Moves the reference point of the exponentials up to `max`, if that is higher.
void raise(int head_dim, double max, Partial& partial) {
  if (partial.sum > 0.0 && max <= partial.max) return;
  const double factor = partial.sum > 0.0 ? std::exp(partial.max - max) : 0.0;
  partial.max = max;
  partial.sum *= factor;
  for (int c = 0; c < head_dim; ++c) partial.out[c] *= factor;
}

}  // namespace

void add_token(int head_dim, double score, const double* v, Partial& partial) {
  raise(head_dim, score, partial);
  const double weight = std::exp(score - partial.max);
  partial.sum += weight;
  if (v == nullptr) return;
  for (int c = 0; c < head_dim; ++c) partial.out[c] += weight * v[c];
}

void merge(int head_dim, const Partial& part, Partial& target) {
  if (part.sum == 0.0) return;
  raise(head_dim, part.max, target);
  const double factor = std::exp(part.max - target.max);
  target.sum += factor * part.sum;
  for (int c = 0; c < head_dim; ++c) target.out[c] += factor * part.out[c];
}

double finish(int head_dim, const Partial& partial, double* out) {
  const bool empty = partial.sum == 0.0;
  for (int c = 0; c < head_dim; ++c) out[c] = empty ? 0.0 : partial.out[c] / partial.sum;
  return empty ? -std::numeric_limits<double>::infinity() : partial.max + std::log(partial.sum);
}

}  // namespace oscar::reference
