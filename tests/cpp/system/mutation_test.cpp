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
CacheSetup one_tile_setup(Format format, int head_dim) {
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

// What every test flips bits of: one tile, a query over it, and what the flipped tile says.
struct OneTile {
  CacheFixture fixture;
  Call call;
  Rows q;
  AttendOptions options{.scale = 0.25f};

  explicit OneTile(Format format, int head_dim = 32)
      : fixture(grown(format, head_dim)),
        call(fixture.next({1})),
        q(random_queries(fixture, 1, kQueryHeads, DType::kF32, 5)) {}

  static CacheFixture grown(Format format, int head_dim) {
    CacheFixture fixture(one_tile_setup(format, head_dim));
    fixture.grow({32});
    return fixture;
  }
  [[nodiscard]] std::uint8_t* bytes() { return const_cast<std::uint8_t*>(fixture.tile(0, 0, 0)); }
  [[nodiscard]] Result attend() { return run_attend(fixture, call, q, options); }
  [[nodiscard]] Expected expected() { return expected_attention(fixture, call, q, options); }
};

class Mutation : public BackendTest {};

TEST_P(Mutation, EveryBitCounts) {
  for (const Format format : kFormats) {
    OneTile one(format);
    const std::vector<float> before = flatten(one.attend().out);
    const Expected truth = one.expected();
    auto* tile = one.bytes();
    std::mt19937 random(6);
    for (const Section& section : sections_of(one.fixture.layout.tile())) {
      for (int i = 0; i < kFlips; ++i) {
        const int byte =
            section.begin +
            static_cast<int>(random() % static_cast<unsigned>(section.end - section.begin));
        const int bit =
            section.first_bit + static_cast<int>(random() % static_cast<unsigned>(section.bits));
        SCOPED_TRACE(::testing::Message() << name_of(format) << " " << section.name << " byte "
                                          << byte - section.begin << " bit " << bit);
        tile[byte] ^= static_cast<std::uint8_t>(1 << bit);
        const Result result = one.attend();
        ASSERT_TRUE(result.status.ok());
        // Negated, so that a NaN (a unit that became infinite) is a change as well.
        const double change = difference(before, flatten(result.out));
        EXPECT_FALSE(change < 1e-6) << change;
        tile[byte] ^= static_cast<std::uint8_t>(1 << bit);
      }
    }
    EXPECT_EQ(flatten(one.attend().out), before);
    EXPECT_LE(output_error(one.attend().out, truth), is_int8() ? 2e-2 : 1e-3);
  }
}

// As above, for all of the bits that say what a channel's codes mean.
TEST_P(Mutation, EveryParameterBitCounts) {
  for (const Format format : kFormats) {
    OneTile one(format);
    const Expected truth = one.expected();
    const TileLayout layout = one.fixture.layout.tile();
    auto* params = one.bytes() + layout.k_params_offset();
    const Result before = one.attend();
    for (int bit = 0; bit < 8; ++bit) {
      for (int c = 0; c < layout.head_dim; ++c) {
        SCOPED_TRACE(::testing::Message() << name_of(format) << " channel " << c << " bit " << bit);
        params[c] ^= static_cast<std::uint8_t>(1 << bit);
        const Result result = one.attend();
        EXPECT_GT(difference(flatten(before.out), flatten(result.out)), 1e-6);
        // The float kernels are exact enough to be compared with what the tile says now.
        const Expected expected = one.expected();
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
    OneTile one(format);
    const Expected truth = one.expected();
    const TileLayout tile = one.fixture.layout.tile();
    auto* bytes = one.bytes();
    for (int position = 0; position < kTileTokens; ++position) {
      SCOPED_TRACE(::testing::Message() << name_of(format) << " position " << position);
      for (int line = 0; line < tile.k_lines(); ++line) {
        for (int b = 0; b < 4; ++b) bytes[4 * (line * kTileTokens + position) + b] ^= 0xff;
      }
      EXPECT_GT(output_error(one.attend().out, truth), 2e-2);
      for (int line = 0; line < tile.k_lines(); ++line) {
        for (int b = 0; b < 4; ++b) bytes[4 * (line * kTileTokens + position) + b] ^= 0xff;
      }
    }
  }
}

TEST_P(Mutation, PaddingDoesNotCount) {
  OneTile one(kK2V2, 48);
  one.options = {};
  const std::vector<float> before = flatten(one.attend().out);
  const TileLayout tile = one.fixture.layout.tile();
  ASSERT_LT(tile.used_bytes(), tile.tile_bytes());
  auto* bytes = one.bytes();
  for (int i = tile.used_bytes(); i < tile.tile_bytes(); ++i) bytes[i] ^= 0xff;
  EXPECT_EQ(flatten(one.attend().out), before);
}

OSCAR_FOR_ALL_BACKENDS(Mutation);

}  // namespace
}  // namespace oscar::testing
