// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/combine.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace oscar::reference {
namespace {

constexpr int kDim = 32;

void add(double score, double value, Partial& partial) {
  double v[kDim];
  for (int c = 0; c < kDim; ++c) v[c] = value + c;
  add_token(kDim, score, v, partial);
}

TEST(Combine, NothingIsZeroAndMinusInfinity) {
  Partial partial;
  merge(kDim, Partial(), partial);
  double out[kDim] = {1.0};
  EXPECT_EQ(finish(kDim, partial, out), -std::numeric_limits<double>::infinity());
  EXPECT_EQ(out[0], 0.0);
}

TEST(Combine, WeightedMean) {
  Partial partial;
  add(std::log(1.0), 10.0, partial);
  add(std::log(3.0), 20.0, partial);
  double out[kDim];
  EXPECT_NEAR(finish(kDim, partial, out), std::log(4.0), 1e-14);
  for (int c = 0; c < kDim; ++c) EXPECT_NEAR(out[c], 17.5 + c, 1e-12);
}

TEST(Combine, SinkTakesWeightWithoutValue) {
  Partial partial;
  add(0.0, 8.0, partial);
  add_token(kDim, 0.0, nullptr, partial);
  double out[kDim];
  EXPECT_NEAR(finish(kDim, partial, out), std::log(2.0), 1e-14);
  EXPECT_NEAR(out[0], 4.0, 1e-14);
}

// Any split gives what one pass gives, also where the parts' scores are 700 apart.
TEST(Combine, AnySplit) {
  std::mt19937 random(5);
  std::uniform_real_distribution<double> score(-350.0, 350.0);
  for (int split = 0; split <= 20; ++split) {
    Partial whole;
    Partial first;
    Partial second;
    for (int t = 0; t < 20; ++t) {
      const double s = score(random);
      add(s, t, whole);
      add(s, t, t < split ? first : second);
    }
    merge(kDim, first, second);
    double expected[kDim];
    double out[kDim];
    EXPECT_NEAR(finish(kDim, second, out), finish(kDim, whole, expected), 1e-10);
    for (int c = 0; c < kDim; ++c) EXPECT_NEAR(out[c], expected[c], 1e-10);
  }
}

TEST(Combine, LargeScoresDoNotOverflow) {
  Partial partial;
  add(1e6, 1.0, partial);
  add(-1e6, 5.0, partial);
  double out[kDim];
  EXPECT_EQ(finish(kDim, partial, out), 1e6);
  EXPECT_EQ(out[0], 1.0);
}

}  // namespace
}  // namespace oscar::reference
