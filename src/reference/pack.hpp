// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// pack: the content of a tile to its bytes and back.
#pragma once

#include <cstdint>

#include "oscar/format.hpp"
#include "reference/quantize.hpp"

namespace oscar::reference {

// bytes [tile_bytes]: every byte is written, padding with 0.
void pack(const TileLayout& layout, const Tile& tile, std::uint8_t* bytes);

// The inverse; channels from head_dim on are left alone.
void unpack(const TileLayout& layout, const std::uint8_t* bytes, Tile& tile);

}  // namespace oscar::reference
