// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// scale: the logarithmic indices of a token, eight steps an octave: K norm and V scale.
#pragma once

#include <cstdint>

namespace oscar::reference {

// Index of the root mean square of y [head_dim]; 0 for an all-zero row, else 1..255.
std::uint8_t norm_index(int head_dim, const float* y);
// Index of a V scale >= 0; 0 for 0, else 1..255.
std::uint8_t value_scale_index(float scale);

// What a row is divided by for its index, and what a stored index (stored_norm) stands for.
float inverse_norm_of(std::uint8_t index);
float stored_norm_of(std::uint8_t stored);

// What an index stands for, and its inverse. All four are 0 at index 0.
float value_scale_of(std::uint8_t index);
float inverse_value_scale_of(std::uint8_t index);

}  // namespace oscar::reference
