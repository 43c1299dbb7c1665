// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "oscar/format.hpp"

#include <gtest/gtest.h>

#include <set>

#include "core/rows.hpp"
#include "oscar/cache.hpp"

namespace oscar {
namespace {

TEST(Format, SectionsFollowEachOther) {
  for (const Format format : kFormats) {
    for (int head_dim = kMinHeadDim; head_dim <= kMaxHeadDim; head_dim += kHeadDimStep) {
      const TileLayout tile{head_dim, format};
      EXPECT_EQ(tile.k_code_bytes(), head_dim * 4 * format.k_bits);
      EXPECT_EQ(tile.v_code_bytes(), head_dim * 4 * format.v_bits);
      EXPECT_EQ(tile.used_bytes(),
                tile.k_code_bytes() + tile.v_code_bytes() + head_dim + 3 * kTileTokens);
      const int alignment = head_dim < 128 ? 32 : head_dim < 256 ? 64 : 128;
      EXPECT_EQ(tile.tile_bytes() % alignment, 0);
      EXPECT_GE(tile.tile_bytes(), tile.used_bytes());
      EXPECT_LT(tile.tile_bytes() - tile.used_bytes(), alignment);
    }
  }
}

TEST(Format, PositionsAreAPermutation) {
  std::set<int> positions;
  for (int token = 0; token < kTileTokens; ++token) {
    positions.insert(position_of(token));
    EXPECT_EQ(token_at(position_of(token)), token);
  }
  EXPECT_EQ(static_cast<int>(positions.size()), kTileTokens);
  EXPECT_EQ(*positions.begin(), 0);
  EXPECT_EQ(*positions.rbegin(), kTileTokens - 1);
}

TEST(Format, SignsAreBalanced) {
  int negative = 0;
  for (int c = 0; c < kMaxHeadDim; ++c) negative += channel_sign(c) < 0;
  EXPECT_GT(negative, kMaxHeadDim * 2 / 5);
  EXPECT_LT(negative, kMaxHeadDim * 3 / 5);
}

TEST(Format, VersionAndKeyScales) {
  EXPECT_EQ(kFormatVersion, 2);
  EXPECT_EQ(key_scale_steps(0), 2);
  EXPECT_EQ(key_scale_steps(1), 3);
  EXPECT_EQ(key_scale_steps(2), 4);
  EXPECT_EQ(key_scale_steps(kMaxScaleIndex), kMaxScaleSteps);
  for (int i = 0; i < kMaxScaleIndex; ++i) {
    EXPECT_EQ(key_scale_bound(2, i),
              0.5f * static_cast<float>(key_scale_steps(i) + key_scale_steps(i + 1)));
  }
  EXPECT_EQ(key_scale_bound(4, 0), 2.25f);
  EXPECT_EQ(key_scale_bound(4, 1), 3.25f);
  EXPECT_EQ(key_scale_bound(4, 2), 4.5f);
}

TEST(Format, OnlyListedShapes) {
  EXPECT_TRUE(is_head_dim(32) && is_head_dim(80) && is_head_dim(256));
  EXPECT_FALSE(is_head_dim(16) || is_head_dim(72) || is_head_dim(272) || is_head_dim(0));
  EXPECT_FALSE(is_format({2, 4}) || is_format({3, 3}));
}

TEST(Cache, RingHoldsOpenTileAndWindow) {
  for (int window = 0; window <= 200; ++window) {
    Layout layout;
    layout.window = window;
    EXPECT_GE(layout.ring_tokens(), window + kTileTokens - 1);
    EXPECT_EQ(layout.ring_tokens() % kTileTokens, 0);
  }
}

TEST(Cache, PackedTilesFollowThePosition) {
  Layout layout;
  layout.window = 32;
  EXPECT_EQ(packed_tiles(layout, 62, 1000, 0), 0);
  EXPECT_EQ(packed_tiles(layout, 63, 1000, 0), 1);
  EXPECT_EQ(packed_tiles(layout, 94, 1000, 0), 1);
  EXPECT_EQ(packed_tiles(layout, 95, 1000, 0), 2);
  EXPECT_EQ(packed_tiles(layout, 1000, 63, 0), 1) << "no more than complete tiles";
  EXPECT_EQ(packed_tiles(layout, 100, 100, 65), 3) << "tokens without an exact copy";
  layout.window = 0;
  EXPECT_EQ(packed_tiles(layout, 31, 32, 0), 1);
  EXPECT_EQ(packed_tiles(layout, 30, 32, 0), 0);
}

TEST(Rows, ConversionsRoundToNearestEven) {
  EXPECT_EQ(float_to_bf16(1.0f + 0x1p-8f), 0x3f80) << "tie to even below";
  EXPECT_EQ(float_to_bf16(1.0f + 3 * 0x1p-8f), 0x3f82) << "tie to even above";
  EXPECT_EQ(float_to_bf16(1.0f + 0x1p-8f + 0x1p-20f), 0x3f81);
  EXPECT_EQ(float_to_fp16(1.0f + 0x1p-11f), 0x3c00);
  EXPECT_EQ(float_to_fp16(65504.0f), 0x7bff);
  EXPECT_EQ(float_to_fp16(0x1p-24f), 0x0001);
  for (int bits = 0; bits < 0x7f80; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    ASSERT_EQ(float_to_bf16(bf16_to_float(half)), half);
    if (bits < 0x7c00) {
      ASSERT_EQ(float_to_fp16(fp16_to_float(half)), half);
    }
  }
}

}  // namespace
}  // namespace oscar
