// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/rotate.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "oscar/format.hpp"

namespace oscar::reference {
namespace {

std::vector<double> normal_row(int count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> row(static_cast<std::size_t>(count));
  for (double& x : row) x = normal(random);
  return row;
}

std::vector<float> positive_row(int count) {
  std::vector<float> row(static_cast<std::size_t>(count));
  for (int c = 0; c < count; ++c) row[c] = std::exp2(static_cast<float>(c % 7 - 3));
  return row;
}

class Rotate : public ::testing::TestWithParam<int> {};

TEST_P(Rotate, IsTheHadamardMatrix) {
  const int head_dim = GetParam();
  const int block = hadamard_block(head_dim);
  const std::vector<double> x = normal_row(head_dim, 1);
  std::vector<double> y = x;
  rotate_row(Row::kValue, head_dim, nullptr, y.data());
  for (int r = 0; r < head_dim; ++r) {
    double sum = 0.0;
    for (int c = r / block * block; c < r / block * block + block; ++c) {
      const int crossings = std::popcount(static_cast<unsigned>((r % block) & (c % block)));
      sum += (crossings % 2 == 0 ? 1 : -1) * channel_sign(c) * x[c];
    }
    EXPECT_NEAR(y[r], sum / std::sqrt(block), 1e-12);
  }
}

TEST_P(Rotate, InverseRestores) {
  const int head_dim = GetParam();
  const std::vector<float> balance = positive_row(head_dim);
  for (const Row kind : {Row::kKey, Row::kValue, Row::kQuery}) {
    const std::vector<double> x = normal_row(head_dim, 2);
    std::vector<double> y = x;
    rotate_row(kind, head_dim, balance.data(), y.data());
    unrotate_row(kind, head_dim, balance.data(), y.data());
    for (int c = 0; c < head_dim; ++c) EXPECT_NEAR(y[c], x[c], 1e-12);
  }
}

TEST_P(Rotate, ScoresDoNotChange) {
  const int head_dim = GetParam();
  const std::vector<float> balance = positive_row(head_dim);
  std::vector<double> q = normal_row(head_dim, 3);
  std::vector<double> k = normal_row(head_dim, 4);
  double before = 0.0;
  for (int c = 0; c < head_dim; ++c) before += q[c] * k[c];
  rotate_row(Row::kQuery, head_dim, balance.data(), q.data());
  rotate_row(Row::kKey, head_dim, balance.data(), k.data());
  double after = 0.0;
  for (int c = 0; c < head_dim; ++c) after += q[c] * k[c];
  EXPECT_NEAR(after, before, 1e-10);
}

TEST_P(Rotate, FloatFollowsDouble) {
  const int head_dim = GetParam();
  std::vector<double> x = normal_row(head_dim, 5);
  std::vector<float> y(x.begin(), x.end());
  rotate_row(Row::kKey, head_dim, nullptr, x.data());
  rotate_row(Row::kKey, head_dim, nullptr, y.data());
  for (int c = 0; c < head_dim; ++c) EXPECT_NEAR(y[c], x[c], 1e-5);
}

INSTANTIATE_TEST_SUITE_P(HeadDims, Rotate, ::testing::Values(32, 48, 64, 80, 96, 128, 160, 256));

}  // namespace
}  // namespace oscar::reference
