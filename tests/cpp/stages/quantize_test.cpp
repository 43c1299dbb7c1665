// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/quantize.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "core/rows.hpp"
#include "reference/page.hpp"
#include "reference/rotate.hpp"
#include "reference/scale.hpp"

namespace oscar::reference {
namespace {

using Keys = std::vector<float>;  // [32, head_dim]

struct Restored {
  std::vector<double> k;
  std::vector<double> v;
};

Restored restore(const TileLayout& layout, const Tile& tile, int token) {
  const auto size = static_cast<std::size_t>(layout.head_dim);
  Restored row{std::vector<double>(size), std::vector<double>(size)};
  read_packed(layout, tile, nullptr, token, row.k.data(), row.v.data());
  return row;
}

// K of +-1 has norm 1, so that z is y. Channel 0 is +1 at tokens 0..15, others alternate.
TEST(QuantizeKeys, HandComputed) {
  const TileLayout layout{32, kK2V2};
  Keys y(32 * 32);
  for (int t = 0; t < 32; ++t) {
    for (int c = 0; c < 32; ++c) y[t * 32 + c] = c == 0 ? (t < 16 ? 1 : -1) : (t % 2 ? 1 : -1);
  }
  Tile tile{};
  quantize_keys(layout, y.data(), tile);
  const float scale = 0.88f / 3 * 2;
  EXPECT_EQ(tile.k_max_scale, float_to_bf16(2 * scale)) << "all norms are 1, the next octave is 2";
  EXPECT_EQ(tile.k_max_mid, 0);
  for (int t = 0; t < 32; ++t) {
    EXPECT_EQ(tile.k_norms[t], 120);
    for (int c = 0; c < 32; ++c) {
      EXPECT_EQ(tile.k_scales[c], 3);
      EXPECT_EQ(tile.k_mids[c], 0);
      EXPECT_EQ(tile.k_codes[t][c], y[t * 32 + c] > 0 ? 3 : 0);
    }
  }
  EXPECT_NEAR(restore(layout, tile, 0).k[0], 1.5 * scale, 0x1p-9) << "half a last bit of bf16";
}

// Scales and mids off their grids: U_m = 31/8 / 31 = 1/8, and 0.44 + 31/8 / 93 in bf16 is
// 0.482421875, so U_s = 0.0804 and a scale takes the next index above 0.2010, 0.2814, 0.4020.
TEST(QuantizeKeys, HandComputedIndices) {
  struct Channel {
    float mid;
    float half_range;
    int i_m;
    int i_s;
    int high;  // code of mid + half_range
    int low;
  };
  const Channel channels[] = {
      {3.875f, 0.0f, 31, 0, 2, 2},     // the largest mid
      {0.0f, 0.75f, 0, 3, 3, 0},       // 0.44
      {0.3f, 0.3f, 2, 1, 3, 0},        // 0.176 and 2/3 of 0.05
      {-0.3125f, 0.45f, -2, 2, 3, 0},  // -2.5 units, to even: 0.264 and 2/3 of 0.0625
      {-0.3125f, 0.32f, -2, 1, 3, 0},  // the same mid, 0.1877
      {0.0f, 0.1f, 0, 0, 2, 1},        // 0.0587
      {-0.0625f, 0.0f, 0, 0, 1, 1},    // half a unit, to even: 0.0417
      {-0.1875f, 0.67f, -2, 3, 3, 0},  // 0.393 and 0.0417: only with that above 0.4020
  };
  const TileLayout layout{32, kK2V2};
  Keys y(32 * 32);
  for (int t = 0; t < 32; ++t) {
    for (int c = 0; c < 32; ++c) {
      const Channel& channel = channels[c < 8 ? c : 1];
      y[t * 32 + c] = channel.mid + (t % 2 == 0 ? channel.half_range : -channel.half_range);
    }
  }
  Tile tile{};
  quantize_keys(layout, y.data(), tile);
  EXPECT_EQ(bf16_to_float(tile.k_max_scale), 2 * 0.482421875f) << "the next octave of norm 1 is 2";
  EXPECT_EQ(bf16_to_float(tile.k_max_mid), 2 * 3.875f);
  for (int t = 0; t < 32; ++t) EXPECT_EQ(tile.k_norms[t], 120);
  for (int c = 0; c < 32; ++c) {
    SCOPED_TRACE(c);
    const Channel& channel = channels[c < 8 ? c : 1];
    EXPECT_EQ(tile.k_mids[c], channel.i_m);
    EXPECT_EQ(tile.k_scales[c], channel.i_s);
    EXPECT_EQ(tile.k_codes[0][c], channel.high);
    EXPECT_EQ(tile.k_codes[1][c], channel.low);
  }
  // 3 U_s in place of the channel's 0.2093; code 3 lies 1.5 of them above the mid, 2 units U_m.
  EXPECT_NEAR(restore(layout, tile, 0).k[2], 0.25 + 1.5 * 3 * 0.482421875 / 6, 1e-6);
}

// All tokens equal: every channel is constant, only the mids carry it. A scale cannot be 0: what
// half a step of the smallest one leaves is M / 558.
TEST(QuantizeKeys, ConstantChannels) {
  const TileLayout layout{32, kK2V2};
  Keys y(32 * 32);
  for (int t = 0; t < 32; ++t) {
    for (int c = 0; c < 32; ++c) y[t * 32 + c] = c % 2 ? 1.0f : -1.0f;
  }
  Tile tile{};
  quantize_keys(layout, y.data(), tile);
  EXPECT_EQ(tile.k_max_scale, float_to_bf16(2.0f / 93));
  EXPECT_EQ(tile.k_max_mid, float_to_bf16(2.0f));
  for (int c = 0; c < 32; ++c) {
    EXPECT_EQ(tile.k_scales[c], 0);
    EXPECT_EQ(tile.k_mids[c], c % 2 ? 31 : -31);
    EXPECT_EQ(tile.k_codes[5][c], 2) << "rint(N / 2), half to even";
    EXPECT_NEAR(restore(layout, tile, 5).k[c], c % 2 ? 1.0 : -1.0, 1.01 / 558);
  }
}

TEST(QuantizeKeys, ZeroTokensRestoreToZero) {
  const TileLayout layout{48, kK4V2};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  Keys y(32 * 48);
  for (float& x : y) x = normal(random);
  std::fill_n(y.begin() + 7 * 48, 48, 0.0f);
  Tile tile{};
  quantize_keys(layout, y.data(), tile);
  EXPECT_EQ(tile.k_norms[7], 0);
  for (const double k : restore(layout, tile, 7).k) EXPECT_EQ(k, 0.0);
  std::fill(y.begin(), y.end(), 0.0f);
  quantize_keys(layout, y.data(), tile);
  for (const double k : restore(layout, tile, 0).k) EXPECT_EQ(k, 0.0);
}

TEST(QuantizeKeys, NormOfATokenDoesNotTouchOthers) {
  const TileLayout layout{64, kK2V2};
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  Keys y(32 * 64);
  for (float& x : y) x = normal(random);
  Keys loud = y;
  for (int c = 0; c < 64; ++c) loud[3 * 64 + c] *= 64.0f;
  Tile a{};
  Tile b{};
  quantize_keys(layout, y.data(), a);
  quantize_keys(layout, loud.data(), b);
  // Six octaves, which the units take over from the norms of the others.
  EXPECT_EQ(b.k_max_scale, a.k_max_scale + (6 << 7)) << "the exponent of bf16";
  EXPECT_EQ(b.k_max_mid, a.k_max_mid + (6 << 7));
  for (int t = 0; t < 32; ++t) EXPECT_EQ(b.k_norms[t], a.k_norms[t] - (t == 3 ? 0 : 48));
  for (int t = 0; t < 32; ++t)
    EXPECT_TRUE(std::equal(a.k_codes[t], a.k_codes[t] + 64, b.k_codes[t]));
  EXPECT_TRUE(std::equal(a.k_scales, a.k_scales + 64, b.k_scales));
}

TEST(QuantizeKeys, KeysFarBelowTheLargestReadAsZero) {
  const TileLayout layout{32, kK4V2};
  Keys y(32 * 32);
  for (int t = 0; t < 32; ++t) {
    for (int c = 0; c < 32; ++c) y[t * 32 + c] = std::ldexp(c % 2 ? 1.0f : -1.0f, -t);
  }
  Keys z = y;
  Tile tile{};
  quantize_keys(layout, z.data(), tile);
  for (int t = 0; t < 32; ++t) {
    EXPECT_EQ(tile.k_norms[t], t < 15 ? 120 - 8 * t : 0) << t;
    for (int c = 0; c < 32; ++c) {
      const double expected = t < 15 ? y[t * 32 + c] : 0.0;
      // Scales are up to 2 % larger than the range asks for.
      EXPECT_NEAR(restore(layout, tile, t).k[c], expected, std::abs(expected) * 0x1p-6) << t;
    }
  }
}

// Queries whose channels 2 i and 2 i + 1 correlate by 0.9: the error of the first is to be met by
// one of opposite sign in the second, which is what -0.9 in `feedback` does.
TEST(QuantizeKeys, FeedbackLowersTheErrorOfScores) {
  constexpr int kDim = 64;
  constexpr double kCorrelation = 0.9;
  const TileLayout layout{kDim, kK2V2};
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  Keys y(32 * kDim);
  for (float& x : y) x = normal(random);
  // Diagonal and lower triangle are not read.
  std::vector<std::uint16_t> feedback(kDim * kDim, float_to_fp16(NAN));
  for (int c = 0; c < kDim; ++c) {
    for (int next = c + 1; next < kDim; ++next) feedback[c * kDim + next] = 0;
    if (c % 2 == 0) feedback[c * kDim + c + 1] = float_to_fp16(-kCorrelation);
  }
  double expected_square[2] = {};
  for (const bool fed : {false, true}) {
    Keys z = y;
    Tile tile{};
    quantize_keys(layout, z.data(), tile, fed ? feedback.data() : nullptr);
    for (int t = 0; t < 32; ++t) {
      const Restored row = restore(layout, tile, t);
      for (int c = 0; c < kDim; c += 2) {
        const double a = row.k[c] - y[t * kDim + c];
        const double b = row.k[c + 1] - y[t * kDim + c + 1];
        expected_square[fed] += a * a + b * b + 2.0 * kCorrelation * a * b;
      }
    }
  }
  EXPECT_LT(expected_square[1], 0.75 * expected_square[0]);
}

// Normal numbers around a constant of `offset` a channel.
Keys shifted_keys(int head_dim, float offset, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> constant(static_cast<std::size_t>(head_dim));
  for (float& x : constant) x = offset * normal(random);
  Keys y;
  for (int t = 0; t < 32; ++t) {
    for (const float x : constant) y.push_back(x + normal(random));
  }
  return y;
}

struct Extent {
  double mid;
  double half_range;
};

// Of channel c over the 32 tokens, each divided by its stored norm.
Extent extent_of(const Keys& y, const Tile& tile, int head_dim, int c) {
  double low = std::numeric_limits<double>::infinity();
  double high = -low;
  for (int t = 0; t < 32; ++t) {
    const double z = y[t * head_dim + c] / double{stored_norm_of(tile.k_norms[t])};
    low = std::min(low, z);
    high = std::max(high, z);
  }
  return {0.5 * (low + high), 0.5 * (high - low)};
}

// A mid is off by e, at most half a unit (M / 62). A channel asks for a scale of (r half_range + e)
// / (N / 2), and the bounds between the steps give it 0.8 to 1.2 of that (4 bits: 8 / 9 to 4 / 3),
// or the smallest step. So codes reach at least 0.8 (8 / 9) of r half_range + e to both sides of
// the stored mid; what lies within is off by at most half a scale, what lies beyond by its
// distance. 1 / 256: units are in bf16.
TEST(QuantizeKeys, ErrorIsBounded) {
  for (const Format format : {kK2V2, kK4V4}) {
    const TileLayout layout{128, format};
    const double steps = max_code(format.k_bits);
    const double share = k_range_share(format.k_bits, false);
    const double least = format.k_bits == 2 ? 0.8 : 8.0 / 9;
    const double most = format.k_bits == 2 ? 1.2 : 4.0 / 3;
    for (const float offset : {0.0f, 1.0f, 10.0f, 50.0f, 100.0f, 200.0f, 400.0f}) {
      SCOPED_TRACE(::testing::Message() << name_of(format) << " offset " << offset);
      const Keys y = shifted_keys(128, offset, 3);
      Keys z = y;
      Tile tile{};
      quantize_keys(layout, z.data(), tile);
      const double scale_unit = bf16_to_float(tile.k_max_scale) / 6.0;
      const double mid_unit = bf16_to_float(tile.k_max_mid) / 31.0;
      for (int c = 0; c < 128; ++c) {
        const Extent extent = extent_of(y, tile, 128, c);
        const double scale = key_scale_steps(tile.k_scales[c]) * scale_unit;
        const double e = std::abs(tile.k_mids[c] * mid_unit - extent.mid);
        ASSERT_LE(e, 0.501 * mid_unit);
        const double reach = share * extent.half_range + e;
        const double wanted = reach / (0.5 * steps);
        ASSERT_GE(scale, least * wanted * (1 - 1.0 / 256));
        ASSERT_LE(scale, std::max(most * wanted, 2 * scale_unit) * (1 + 1.0 / 256));
        const double bound = std::max(0.5 * scale, extent.half_range + e - least * reach);
        for (int t = 0; t < 32; ++t) {
          const double error = std::abs(restore(layout, tile, t).k[c] - y[t * 128 + c]);
          ASSERT_LE(error, stored_norm_of(tile.k_norms[t]) * bound * 1.02);
        }
      }
    }
  }
}

// Root mean square error of shifted_keys, whose spread is 1.
double key_error(Format format, float offset) {
  const TileLayout layout{128, format};
  double square = 0.0;
  for (unsigned seed = 0; seed < 8; ++seed) {
    const Keys y = shifted_keys(128, offset, seed);
    Keys z = y;
    Tile tile{};
    quantize_keys(layout, z.data(), tile);
    for (int t = 0; t < 32; ++t) {
      const Restored row = restore(layout, tile, t);
      for (int c = 0; c < 128; ++c) square += std::pow(row.k[c] - y[t * 128 + c], 2);
    }
  }
  return std::sqrt(square / (8 * 32 * 128));
}

// A step is at most 1.2 times 2 / N of the mid's error and the range's share: half of the former is
// what a constant adds. The mid's error is a third of a unit in the mean (1 / sqrt(12)), and M, the
// largest of 128 normal numbers, at most 3.5 times the offset.
TEST(QuantizeKeys, ErrorGrowsSmoothlyWithAConstant) {
  for (const Format format : {kK2V2, kK4V4}) {
    const double slope = 0.6 * 2 / max_code(format.k_bits) * 3.5 / 31 / std::sqrt(12.0);
    const double without = key_error(format, 0.0f);
    double before = without;
    for (const float offset : {50.0f, 100.0f, 200.0f, 400.0f}) {
      SCOPED_TRACE(::testing::Message() << name_of(format) << " offset " << offset);
      const double error = key_error(format, offset);
      EXPECT_GT(error, before);
      EXPECT_LT(error, 2.2 * before);
      EXPECT_LT(error, without + slope * offset);
      before = error;
    }
  }
}

TEST(QuantizeValue, HandComputed) {
  const TileLayout layout{32, kK2V2};
  std::vector<float> y(32);
  for (int c = 0; c < 32; ++c) y[c] = static_cast<float>(c % 4) - 1.0f;  // -1 0 1 2, mid 0.5
  Tile tile{};
  quantize_value(layout, 9, y.data(), tile);
  // 0.82 lies between 2^(-3/8) = 0.771 and 2^(-2/8) = 0.841, nearer to the latter.
  EXPECT_EQ(tile.v_scales[9], 128 - 2);
  EXPECT_EQ(tile.v_mids[9], 38) << "rint(64 0.5 / 0.841)";
  for (int c = 0; c < 32; ++c) EXPECT_EQ(tile.v_codes[9][c], c % 4);
}

// A V that is one channel in the original basis is +-constant in the rotated one, and one with a
// common offset can be constant: the range is then 0 and all of the value is in mid.
TEST(QuantizeValue, ConstantRow) {
  for (const Format format : kFormats) {
    const TileLayout layout{64, format};
    std::vector<float> y(64, 0.0f);
    y[0] = 3.0f;
    rotate_row(Row::kValue, 64, nullptr, y.data());
    ASSERT_TRUE(std::all_of(y.begin(), y.end(), [&](float x) { return x == y[0]; }));
    Tile tile{};
    quantize_value(layout, 0, y.data(), tile);
    for (const double v : restore(layout, tile, 0).v) {
      EXPECT_NEAR(v, y[0], 0.5 * value_scale_of(tile.v_scales[0])) << name_of(format);
    }
  }
}

TEST(QuantizeValue, ZeroRow) {
  const TileLayout layout{32, kK4V4};
  const std::vector<float> y(32, 0.0f);
  Tile tile{};
  quantize_value(layout, 0, y.data(), tile);
  EXPECT_EQ(tile.v_scales[0], 0);
  EXPECT_EQ(tile.v_mids[0], 0);
  EXPECT_EQ(tile.v_codes[0][0], 8) << "rint(7.5)";
  for (const double v : restore(layout, tile, 0).v) EXPECT_EQ(v, 0.0);
}

// Any offset against the range, any size: the error stays within the range that is cut off.
TEST(QuantizeValue, ErrorIsBounded) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> octave(-8.0f, 8.0f);
  for (const Format format : kFormats) {
    const TileLayout layout{96, format};
    const double steps = max_code(format.v_bits);
    for (int i = 0; i < 500; ++i) {
      std::vector<float> y(96);
      const float size = std::exp2(octave(random));
      const float offset = size * std::exp2(octave(random)) * normal(random);
      for (float& x : y) x = offset + size * normal(random);
      Tile tile{};
      quantize_value(layout, 0, y.data(), tile);
      const auto [low, high] = std::minmax_element(y.begin(), y.end());
      const double half_range = 0.5 * (*high - *low);
      const double scale = value_scale_of(tile.v_scales[0]);
      // A step of mid is 1/64; a scale that was rounded down may also leave mid at its limit.
      const double mid_error =
          std::max(scale / 128, std::abs(0.5 * (*high + *low)) - 127.0 / 64.0 * scale);
      const double bound = std::max(0.5 * scale, half_range - 0.5 * steps * scale + mid_error);
      const Restored row = restore(layout, tile, 0);
      for (int c = 0; c < 96; ++c) {
        ASSERT_LE(std::abs(row.v[c] - y[c]), bound * 1.001)
            << name_of(format) << " size " << size << " offset " << offset;
      }
      ASSERT_LE(bound, 0.42 * (std::abs(offset) + 8 * size));
    }
  }
}

}  // namespace
}  // namespace oscar::reference
