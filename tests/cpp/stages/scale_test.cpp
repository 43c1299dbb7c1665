// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/scale.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "oscar/format.hpp"

namespace oscar::reference {
namespace {

std::uint8_t norm_of_constant(float x, int head_dim = 64) {
  const std::vector<float> y(static_cast<std::size_t>(head_dim), x);
  return norm_index(head_dim, y.data());
}

TEST(Scale, NormOfKnownRows) {
  EXPECT_EQ(norm_of_constant(1.0f), 160);
  EXPECT_EQ(norm_of_constant(-2.0f), 168);
  EXPECT_EQ(norm_of_constant(0.5f), 152);
  // One of 64 channels is 8: the mean square is 1.
  std::vector<float> y(64, 0.0f);
  y[13] = 8.0f;
  EXPECT_EQ(norm_index(64, y.data()), 160);
  EXPECT_EQ(inverse_norm_of(160), 1.0f);
  EXPECT_EQ(inverse_norm_of(168), 0.5f);
}

TEST(Scale, NormChangesHalfwayBetweenSteps) {
  const float boundary = std::exp2(1.0f / 16.0f);
  EXPECT_EQ(norm_of_constant(boundary * 0.9999f), 160);
  EXPECT_EQ(norm_of_constant(boundary * 1.0001f), 161);
}

TEST(Scale, ZeroAndExtremes) {
  EXPECT_EQ(norm_of_constant(0.0f), 0);
  EXPECT_EQ(stored_norm_of(0), 0.0f);
  EXPECT_EQ(inverse_norm_of(0), 0.0f);
  EXPECT_EQ(norm_of_constant(1e-18f), 1);
  EXPECT_EQ(norm_of_constant(1e18f), 255);
  EXPECT_EQ(norm_of_constant(65504.0f), 255);
  EXPECT_EQ(inverse_norm_of(1), std::exp2(20.0f - 0.125f));
  EXPECT_EQ(inverse_norm_of(255), std::exp2(-11.875f));
  EXPECT_EQ(stored_norm_of(1), std::exp2(0.125f - 16.0f));
  EXPECT_EQ(stored_norm_of(kMaxNormIndex), std::exp2(-0.125f));
  EXPECT_EQ(value_scale_index(0.0f), 0);
  EXPECT_EQ(value_scale_of(0), 0.0f);
  EXPECT_EQ(value_scale_index(std::numeric_limits<float>::denorm_min()), 1);
  EXPECT_EQ(value_scale_index(std::numeric_limits<float>::max()), 255);
}

TEST(Scale, IndexIsTheRoundedLogarithm) {
  std::mt19937 random(7);
  std::uniform_real_distribution<double> octave(-12.0, 11.0);
  for (int i = 0; i < 10000; ++i) {
    const double x = octave(random);
    const double steps = 8 * x;
    // Too near to a boundary for the float of 2^x to be on the right side of it.
    if (std::abs(steps - std::floor(steps) - 0.5) < 1e-4) continue;
    const auto value = static_cast<float>(std::exp2(x));
    ASSERT_EQ(value_scale_index(value), static_cast<int>(std::rint(steps)) + 128) << value;
    ASSERT_EQ(norm_of_constant(value), static_cast<int>(std::rint(steps)) + 160) << value;
  }
}

TEST(Scale, EveryIndexIsItsOwn) {
  for (int u = 1; u <= 255; ++u) {
    const auto index = static_cast<std::uint8_t>(u);
    EXPECT_EQ(value_scale_index(value_scale_of(index)), index);
    EXPECT_EQ(norm_of_constant(1.0f / inverse_norm_of(index)), index);
    EXPECT_NEAR(value_scale_of(index) * inverse_value_scale_of(index), 1.0f, 2e-7f);
  }
}

// Stored norm and the tile's power of two make the norm again, down to 15 octaves below the
// largest.
TEST(Scale, StoredNormsAreRelativeToTheLargest) {
  for (int largest = 1; largest <= 255; ++largest) {
    const float tile_norm = std::ldexp(1.0f, norm_octave(largest));
    for (int u = 0; u <= largest; ++u) {
      const int stored = stored_norm(u, largest);
      ASSERT_TRUE(stored >= 0 && stored <= kMaxNormIndex) << u << " of " << largest;
      if (u == 0 || u < largest - 127) {
        ASSERT_EQ(stored, 0) << u << " of " << largest;
      } else if (u > largest - 120) {
        const float norm = stored_norm_of(static_cast<std::uint8_t>(stored)) * tile_norm;
        ASSERT_NEAR(norm * inverse_norm_of(static_cast<std::uint8_t>(u)), 1.0f, 2e-7f);
      }
    }
    ASSERT_GE(stored_norm(largest, largest), 120);
  }
}

}  // namespace
}  // namespace oscar::reference
