// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Every stored bit matters: a flip of any one changes the output.
#include <cmath>

#include "oracle.hpp"
#include "support.hpp"

namespace oscar::testing {
namespace {

constexpr int kQueryHeads = 16;
constexpr int kFlips = 24;  // a section

struct Section {
  const char* name;
  int begin;
  int end;
  int first_bit = 0;  // of its bytes
  int bits = 8;
};

std::vector<Section> sections_of(const TileLayout& tile) {
  return {{"K codes", tile.k_codes_offset(), tile.v_codes_offset()},
          {"V codes", tile.v_codes_offset(), tile.k_params_offset()},
          {"K params", tile.k_params_offset(), tile.v_scales_offset()},
          {"V scales", tile.v_scales_offset(), tile.v_mids_offset()},
          {"V mids", tile.v_mids_offset(), tile.k_norms_offset()},
          {"K norms", tile.k_norms_offset(), tile.used_bytes(), 0, 7},
          {"K units", tile.k_norms_offset(), tile.used_bytes(), 7, 1}};
}

// One tile, no window and no sinks: the query reads 32 packed tokens and its own.
CacheSetup one_tile(Format format, int head_dim = 32) {
  CacheSetup setup;
  setup.layout.kv_heads = 1;
  setup.layout.head_dim = head_dim;
  setup.layout.format = format;
  setup.layout.window = 0;
  setup.layout.sinks = 0;
  setup.capacity = {33};
  return setup;
}

std::vector<float> flatten(const Rows& out) {
  std::vector<float> all;
  for (int head = 0; head < kQueryHeads; ++head) {
    for (const float x : out.get(0, head)) all.push_back(x);
  }
  return all;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0.0;
  double size = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    size += a[i] * a[i];
  }
  return std::sqrt(error / size);
}

class Mutation : public BackendTest {};

TEST_P(Mutation, EveryBitCounts) {
  for (const Format format : kFormats) {
    CacheFixture fixture(one_tile(format));
    fixture.grow({32});
    const Call call = fixture.next({1});
    const Rows q = random_queries(fixture, 1, kQueryHeads, DType::kF32, 5);
    const AttendOptions options{.scale = 0.25f};
    const std::vector<float> before = flatten(run_attend(fixture, call, q, options).out);
    const Expected truth = expected_attention(fixture, call, q, options);
    auto* tile = const_cast<std::uint8_t*>(fixture.tile(0, 0, 0));
    std::mt19937 random(6);
    for (const Section& section : sections_of(fixture.layout.tile())) {
      for (int i = 0; i < kFlips; ++i) {
        const int byte =
            section.begin +
            static_cast<int>(random() % static_cast<unsigned>(section.end - section.begin));
        const int bit =
            section.first_bit + static_cast<int>(random() % static_cast<unsigned>(section.bits));
        SCOPED_TRACE(::testing::Message() << name_of(format) << " " << section.name << " byte "
                                          << byte - section.begin << " bit " << bit);
        tile[byte] ^= static_cast<std::uint8_t>(1 << bit);
        const Result result = run_attend(fixture, call, q, options);
        ASSERT_TRUE(result.status.ok());
        // Negated, so that a NaN (a unit that became infinite) is a change as well.
        const double change = difference(before, flatten(result.out));
        EXPECT_FALSE(change < 1e-6) << change;
        tile[byte] ^= static_cast<std::uint8_t>(1 << bit);
      }
    }
    EXPECT_EQ(flatten(run_attend(fixture, call, q, options).out), before);
    EXPECT_LE(output_error(run_attend(fixture, call, q, options).out, truth),
              is_int8() ? 2e-2 : 1e-3);
  }
}

// As above, for all of the bits that say what a channel's codes mean.
TEST_P(Mutation, EveryParameterBitCounts) {
  for (const Format format : kFormats) {
    CacheFixture fixture(one_tile(format));
    fixture.grow({32});
    const Call call = fixture.next({1});
    const Rows q = random_queries(fixture, 1, kQueryHeads, DType::kF32, 5);
    const AttendOptions options{.scale = 0.25f};
    const Expected truth = expected_attention(fixture, call, q, options);
    const TileLayout layout = fixture.layout.tile();
    auto* params = const_cast<std::uint8_t*>(fixture.tile(0, 0, 0)) + layout.k_params_offset();
    const Result before = run_attend(fixture, call, q, options);
    for (int bit = 0; bit < 8; ++bit) {
      for (int c = 0; c < layout.head_dim; ++c) {
        SCOPED_TRACE(::testing::Message() << name_of(format) << " channel " << c << " bit " << bit);
        params[c] ^= static_cast<std::uint8_t>(1 << bit);
        const Result result = run_attend(fixture, call, q, options);
        EXPECT_GT(difference(flatten(before.out), flatten(result.out)), 1e-6);
        // The float kernels are exact enough to be compared with what the tile says now.
        const Expected expected = expected_attention(fixture, call, q, options);
        EXPECT_LE(output_error(result.out, expected), is_int8() ? 5e-2 : 2e-5);
        params[c] ^= static_cast<std::uint8_t>(1 << bit);
        if (!is_int8()) {
          EXPECT_GT(output_error(result.out, truth), 2e-5);
        }
      }
    }
  }
}

// The comparison of attend_test is sharp enough to see a wrong code: all codes of one token.
TEST_P(Mutation, OracleSeesAWrongToken) {
  for (const Format format : kFormats) {
    CacheFixture fixture(one_tile(format));
    fixture.grow({32});
    const Call call = fixture.next({1});
    const Rows q = random_queries(fixture, 1, kQueryHeads, DType::kF32, 5);
    const AttendOptions options{.scale = 0.25f};
    const Expected truth = expected_attention(fixture, call, q, options);
    const TileLayout tile = fixture.layout.tile();
    auto* bytes = const_cast<std::uint8_t*>(fixture.tile(0, 0, 0));
    for (int position = 0; position < kTileTokens; ++position) {
      SCOPED_TRACE(::testing::Message() << name_of(format) << " position " << position);
      for (int line = 0; line < tile.k_lines(); ++line) {
        for (int b = 0; b < 4; ++b) bytes[4 * (line * kTileTokens + position) + b] ^= 0xff;
      }
      EXPECT_GT(output_error(run_attend(fixture, call, q, options).out, truth), 2e-2);
      for (int line = 0; line < tile.k_lines(); ++line) {
        for (int b = 0; b < 4; ++b) bytes[4 * (line * kTileTokens + position) + b] ^= 0xff;
      }
    }
  }
}

TEST_P(Mutation, PaddingDoesNotCount) {
  CacheFixture fixture(one_tile(kK2V2, 48));
  fixture.grow({32});
  const Call call = fixture.next({1});
  const Rows q = random_queries(fixture, 1, kQueryHeads, DType::kF32, 5);
  const std::vector<float> before = flatten(run_attend(fixture, call, q, {}).out);
  const TileLayout tile = fixture.layout.tile();
  ASSERT_LT(tile.used_bytes(), tile.tile_bytes());
  auto* bytes = const_cast<std::uint8_t*>(fixture.tile(0, 0, 0));
  for (int i = tile.used_bytes(); i < tile.tile_bytes(); ++i) bytes[i] ^= 0xff;
  EXPECT_EQ(flatten(run_attend(fixture, call, q, {}).out), before);
}

OSCAR_FOR_ALL_BACKENDS(Mutation);

}  // namespace
}  // namespace oscar::testing
