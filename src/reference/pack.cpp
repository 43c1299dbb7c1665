// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// A code stands in 32-bit little-endian words; byte by byte here, so that no byte order is assumed.
#include "reference/pack.hpp"

#include <cstring>

namespace oscar::reference {
namespace {

void put(std::uint8_t* section, int word, int shift, std::uint8_t code) {
  section[4 * word + shift / 8] |= static_cast<std::uint8_t>(code << (shift % 8));
}

std::uint8_t get(const std::uint8_t* section, int word, int shift, int bits) {
  return static_cast<std::uint8_t>(section[4 * word + shift / 8] >> (shift % 8) & max_code(bits));
}

// Bit p of the two bf16 units: U_s in positions 0 to 15, U_m in positions 16 to 31.
int unit_bit(const Tile& tile, int p) {
  return p < 16 ? tile.k_max_scale >> p & 1 : tile.k_max_mid >> (p - 16) & 1;
}

}  // namespace

void pack(const TileLayout& layout, const Tile& tile, std::uint8_t* bytes) {
  std::memset(bytes, 0, static_cast<std::size_t>(layout.tile_bytes()));
  for (int t = 0; t < kTileTokens; ++t) {
    const int p = position_of(t);
    for (int c = 0; c < layout.head_dim; ++c) {
      put(bytes + layout.k_codes_offset(), layout.k_word(p, c), layout.k_shift(c),
          tile.k_codes[t][c]);
      put(bytes + layout.v_codes_offset(), layout.v_word(p, c), layout.v_shift(p, c),
          tile.v_codes[t][c]);
    }
    bytes[layout.v_scales_offset() + p] = tile.v_scales[t];
    bytes[layout.v_mids_offset() + p] = static_cast<std::uint8_t>(tile.v_mids[t]);
    bytes[layout.k_norms_offset() + p] =
        static_cast<std::uint8_t>(tile.k_norms[t] | unit_bit(tile, p) << 7);
  }
  for (int c = 0; c < layout.head_dim; ++c) {
    bytes[layout.k_params_offset() + c] = static_cast<std::uint8_t>(
        (tile.k_mids[c] + kMaxMidIndex) | tile.k_scales[c] << kScaleShift);
  }
}

void unpack(const TileLayout& layout, const std::uint8_t* bytes, Tile& tile) {
  std::uint32_t units = 0;
  for (int t = 0; t < kTileTokens; ++t) {
    const int p = position_of(t);
    for (int c = 0; c < layout.head_dim; ++c) {
      tile.k_codes[t][c] = get(bytes + layout.k_codes_offset(), layout.k_word(p, c),
                               layout.k_shift(c), layout.format.k_bits);
      tile.v_codes[t][c] = get(bytes + layout.v_codes_offset(), layout.v_word(p, c),
                               layout.v_shift(p, c), layout.format.v_bits);
    }
    tile.v_scales[t] = bytes[layout.v_scales_offset() + p];
    tile.v_mids[t] = static_cast<std::int8_t>(bytes[layout.v_mids_offset() + p]);
    const std::uint8_t norm = bytes[layout.k_norms_offset() + p];
    tile.k_norms[t] = norm & kMaxNormIndex;
    units |= std::uint32_t{norm} >> 7 << p;
  }
  for (int c = 0; c < layout.head_dim; ++c) {
    const int param = bytes[layout.k_params_offset() + c];
    tile.k_scales[c] = static_cast<std::uint8_t>(param >> kScaleShift);
    tile.k_mids[c] = static_cast<std::int8_t>((param & ((1 << kScaleShift) - 1)) - kMaxMidIndex);
  }
  tile.k_max_scale = static_cast<std::uint16_t>(units & 0xffffu);
  tile.k_max_mid = static_cast<std::uint16_t>(units >> 16);
}

}  // namespace oscar::reference
