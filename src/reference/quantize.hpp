// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// quantize: rotated rows to codes and their parameters.
#pragma once

#include <cstdint>

#include "oscar/format.hpp"

namespace oscar::reference {

// The content of a tile, not yet packed. Every array a token is in token order.
struct Tile {
  std::uint8_t k_codes[kTileTokens][kMaxHeadDim];
  std::uint8_t v_codes[kTileTokens][kMaxHeadDim];
  std::uint8_t k_scales[kMaxHeadDim];  // i_s
  std::int8_t k_mids[kMaxHeadDim];     // i_m
  std::uint8_t k_norms[kTileTokens];   // stored_norm
  std::uint16_t k_max_scale;           // bf16, times 2^norm_octave
  std::uint16_t k_max_mid;             // bf16, times 2^norm_octave
  std::uint8_t v_scales[kTileTokens];
  std::int8_t v_mids[kTileTokens];
};

// y [32, head_dim], rotated K of one head; fills the k_ members. y is overwritten with the rows
// divided by their norms, errors carried on. feedback: [head_dim, head_dim] fp16 or null.
void quantize_keys(const TileLayout& layout, float* y, Tile& tile,
                   const std::uint16_t* feedback = nullptr);

// y [head_dim], rotated V of one token; fills the v_ members of that token.
void quantize_value(const TileLayout& layout, int token, const float* y, Tile& tile);

}  // namespace oscar::reference
