// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The transform is symmetric and orthonormal, so it is its own inverse.
#include "reference/rotate.hpp"

#include <cmath>

#include "oscar/format.hpp"

namespace oscar::reference {
namespace {

template <typename T>
T channel_factor(Row kind, const float* balance, int channel) {
  const T sign = channel_sign(channel);
  if (kind == Row::kValue || balance == nullptr) return sign;
  const T factor = balance[channel];
  return kind == Row::kKey ? sign / factor : sign * factor;
}

template <typename T>
void hadamard(int head_dim, T* row) {
  const int block = hadamard_block(head_dim);
  for (int distance = 1; distance < block; distance *= 2) {
    for (int c = 0; c < head_dim; ++c) {
      if ((c & distance) != 0) continue;
      const T a = row[c];
      const T b = row[c + distance];
      row[c] = a + b;
      row[c + distance] = a - b;
    }
  }
  const T norm = static_cast<T>(1.0 / std::sqrt(static_cast<double>(block)));
  for (int c = 0; c < head_dim; ++c) row[c] *= norm;
}

template <typename T>
void rotate(Row kind, int head_dim, const float* balance, T* row) {
  for (int c = 0; c < head_dim; ++c) row[c] *= channel_factor<T>(kind, balance, c);
  hadamard(head_dim, row);
}

template <typename T>
void unrotate(Row kind, int head_dim, const float* balance, T* row) {
  hadamard(head_dim, row);
  for (int c = 0; c < head_dim; ++c) row[c] /= channel_factor<T>(kind, balance, c);
}

}  // namespace

void rotate_row(Row kind, int head_dim, const float* balance, float* row) {
  rotate(kind, head_dim, balance, row);
}
void rotate_row(Row kind, int head_dim, const float* balance, double* row) {
  rotate(kind, head_dim, balance, row);
}
void unrotate_row(Row kind, int head_dim, const float* balance, float* row) {
  unrotate(kind, head_dim, balance, row);
}
void unrotate_row(Row kind, int head_dim, const float* balance, double* row) {
  unrotate(kind, head_dim, balance, row);
}

}  // namespace oscar::reference
