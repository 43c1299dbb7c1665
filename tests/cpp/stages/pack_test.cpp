// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/pack.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <tuple>
#include <vector>

namespace oscar::reference {
namespace {

Tile random_tile(const TileLayout& layout, unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](int limit) {
    return static_cast<int>(random() % static_cast<unsigned>(limit));
  };
  Tile tile{};
  for (int t = 0; t < kTileTokens; ++t) {
    for (int c = 0; c < layout.head_dim; ++c) {
      tile.k_codes[t][c] = static_cast<std::uint8_t>(below(1 << layout.format.k_bits));
      tile.v_codes[t][c] = static_cast<std::uint8_t>(below(1 << layout.format.v_bits));
    }
    tile.k_norms[t] = static_cast<std::uint8_t>(below(kMaxNormIndex + 1));
    tile.v_scales[t] = static_cast<std::uint8_t>(below(256));
    tile.v_mids[t] = static_cast<std::int8_t>(below(255) - 127);
  }
  for (int c = 0; c < layout.head_dim; ++c) {
    tile.k_scales[c] = static_cast<std::uint8_t>(below(4));
    tile.k_mids[c] = static_cast<std::int8_t>(below(63) - 31);
  }
  tile.k_max_scale = static_cast<std::uint16_t>(below(65536));
  tile.k_max_mid = static_cast<std::uint16_t>(below(65536));
  return tile;
}

void expect_equal(const TileLayout& layout, const Tile& a, const Tile& b) {
  for (int t = 0; t < kTileTokens; ++t) {
    EXPECT_TRUE(std::equal(a.k_codes[t], a.k_codes[t] + layout.head_dim, b.k_codes[t])) << t;
    EXPECT_TRUE(std::equal(a.v_codes[t], a.v_codes[t] + layout.head_dim, b.v_codes[t])) << t;
  }
  EXPECT_TRUE(std::equal(a.k_scales, a.k_scales + layout.head_dim, b.k_scales));
  EXPECT_TRUE(std::equal(a.k_mids, a.k_mids + layout.head_dim, b.k_mids));
  EXPECT_TRUE(std::equal(a.k_norms, a.k_norms + kTileTokens, b.k_norms));
  EXPECT_TRUE(std::equal(a.v_scales, a.v_scales + kTileTokens, b.v_scales));
  EXPECT_TRUE(std::equal(a.v_mids, a.v_mids + kTileTokens, b.v_mids));
  EXPECT_EQ(a.k_max_scale, b.k_max_scale);
  EXPECT_EQ(a.k_max_mid, b.k_max_mid);
}

TEST(Pack, RoundTrip) {
  for (const Format format : kFormats) {
    for (int head_dim = kMinHeadDim; head_dim <= kMaxHeadDim; head_dim += kHeadDimStep) {
      SCOPED_TRACE(::testing::Message() << name_of(format) << " head_dim " << head_dim);
      const TileLayout layout{head_dim, format};
      const Tile tile = random_tile(layout, static_cast<unsigned>(head_dim));
      std::vector<std::uint8_t> bytes(static_cast<std::size_t>(layout.tile_bytes()), 0xff);
      pack(layout, tile, bytes.data());
      Tile back{};
      unpack(layout, bytes.data(), back);
      expect_equal(layout, tile, back);
      EXPECT_TRUE(std::all_of(bytes.begin() + layout.used_bytes(), bytes.end(), [](std::uint8_t x) {
        return x == 0;
      })) << "padding";
    }
  }
}

TEST(Pack, EveryCodeHasItsOwnBits) {
  for (const Format format : kFormats) {
    for (int head_dim = kMinHeadDim; head_dim <= kMaxHeadDim; head_dim += kHeadDimStep) {
      const TileLayout layout{head_dim, format};
      std::set<std::pair<int, int>> k_places;
      std::set<std::pair<int, int>> v_places;
      for (int p = 0; p < kTileTokens; ++p) {
        for (int c = 0; c < head_dim; ++c) {
          k_places.emplace(layout.k_word(p, c), layout.k_shift(c));
          v_places.emplace(layout.v_word(p, c), layout.v_shift(p, c));
        }
      }
      const auto codes = static_cast<std::size_t>(kTileTokens * head_dim);
      EXPECT_EQ(k_places.size(), codes);
      EXPECT_EQ(v_places.size(), codes);
      EXPECT_EQ(k_places.rbegin()->first, layout.k_code_bytes() / 4 - 1);
      EXPECT_EQ(v_places.rbegin()->first, layout.v_code_bytes() / 4 - 1);
    }
  }
}

// The places that the comment in format.hpp gives, by hand.
TEST(Pack, BitPositions) {
  struct Place {
    Format format;
    int token;
    int channel;
    int k_byte;
    int k_bit;
    int v_byte;
    int v_bit;
  };
  // Token 9: position 4 (9 % 8) + 9 / 8 = 5, quad 1, byte 1.
  const Place places[] = {
      // K: line 0, word 5, byte 3, pair 2. V: group 0 (of 16), word 1 x 16 + 11, byte 1, pair 0.
      {kK2V2, 9, 11, 4 * 5 + 3, 4, 4 * (16 + 11) + 1, 0},
      // K: line 3, word 3 x 32 + 5, byte 2, pair 3. V: group 3, word 1 x 16 + 14, byte 1, pair 3.
      {kK2V2, 9, 62, 4 * (96 + 5) + 2, 6, 4 * (16 + 14) + 1, 6},
      // K: line 7, word 7 x 32 + 5, byte 2, nibble 1. V: as before.
      {kK4V2, 9, 62, 4 * (224 + 5) + 2, 4, 4 * (16 + 14) + 1, 6},
      // V: group 1 (of 32), word 1 x 32 + 30, byte 1, nibble 1.
      {kK4V4, 9, 62, 4 * (224 + 5) + 2, 4, 4 * (32 + 30) + 1, 4},
      // Token 31: position 31, quad 7, byte 3.
      {kK4V4, 31, 0, 4 * 31, 0, 4 * (7 * 32) + 3, 0},
  };
  for (const Place& place : places) {
    const TileLayout layout{64, place.format};
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(layout.tile_bytes()));
    Tile tile{};
    tile.k_codes[place.token][place.channel] = 1;
    pack(layout, tile, bytes.data());
    EXPECT_EQ(bytes[place.k_byte], 1 << place.k_bit) << place.channel;
    tile = {};
    tile.v_codes[place.token][place.channel] = 1;
    pack(layout, tile, bytes.data());
    EXPECT_EQ(bytes[layout.v_codes_offset() + place.v_byte], 1 << place.v_bit) << place.channel;
  }
}

TEST(Pack, Parameters) {
  const TileLayout layout{128, kK2V2};
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(layout.tile_bytes()));
  Tile tile{};
  tile.k_scales[5] = 3;
  tile.k_mids[5] = -2;
  tile.k_scales[6] = 1;
  tile.k_mids[6] = 31;
  tile.k_norms[17] = 100;
  tile.v_scales[17] = 100;
  tile.v_mids[17] = -1;
  tile.k_max_scale = 0x1244;
  tile.k_max_mid = 0x5678;
  pack(layout, tile, bytes.data());
  EXPECT_EQ(bytes[2048 + 4], 31) << "the mid 0 and the smallest scale";
  EXPECT_EQ(bytes[2048 + 5], 0b11'011101);
  EXPECT_EQ(bytes[2048 + 6], 0b01'111110);
  const int position = 4 * 1 + 2;  // token 17
  EXPECT_EQ(bytes[2176 + position], 100);
  EXPECT_EQ(bytes[2208 + position], 0xff);
  for (int p = 0; p < 32; ++p) {
    const int unit_bit = 0x56781244u >> p & 1u;
    EXPECT_EQ(bytes[2240 + p], (p == position ? 100 : 0) + 128 * unit_bit) << p;
  }
  EXPECT_EQ(bytes[2240 + position], 228) << "a norm and a bit of U_s in one byte";
}

}  // namespace
}  // namespace oscar::reference
