// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// rotate: a row of K, V or Q to the basis in which it is stored, and back.
#pragma once

namespace oscar::reference {

enum class Row { kKey, kValue, kQuery };

// row [head_dim], in place: sign and balance, then the Walsh-Hadamard transform of each block.
// balance [head_dim] of the row's KV head, or null (= 1). float: the exact arithmetic of the
// format.
void rotate_row(Row kind, int head_dim, const float* balance, float* row);
void rotate_row(Row kind, int head_dim, const float* balance, double* row);

// The inverse: row [head_dim], in place.
void unrotate_row(Row kind, int head_dim, const float* balance, float* row);
void unrotate_row(Row kind, int head_dim, const float* balance, double* row);

}  // namespace oscar::reference
