// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Keys with a large part that all tokens share, with and without a centre that takes it out.
#include <cmath>

#include "oracle.hpp"
#include "support.hpp"

namespace oscar::testing {
namespace {

class Center : public BackendTest {};

CacheSetup make_setup(Format format, int head_dim) {
  CacheSetup setup;
  setup.layout.kv_heads = 2;
  setup.layout.head_dim = head_dim;
  setup.layout.format = format;
  setup.layout.window = 0;
  setup.layout.sinks = 0;
  setup.layout.exact_dtype = DType::kF32;
  setup.capacity = {161, 97};
  setup.dtype = DType::kF32;
  setup.balance = true;
  return setup;
}

// Root mean square error of the keys in tiles.
double key_error(const CacheFixture& fixture) {
  double square = 0.0;
  int count = 0;
  std::vector<double> k;
  std::vector<double> v;
  for (int b = 0; b < fixture.batch_size(); ++b) {
    for (int head = 0; head < fixture.layout.kv_heads; ++head) {
      for (int t = 0; t < fixture.seq_len[b] / kTileTokens * kTileTokens; ++t) {
        decode_token(fixture, b, head, t, k, v);
        for (int c = 0; c < fixture.layout.head_dim; ++c, ++count) {
          square += std::pow(k[c] - fixture.key(b, t, head)[c], 2);
        }
      }
    }
  }
  return std::sqrt(square / count);
}

TEST_P(Center, OfTheConstantGivesTheErrorWithoutIt) {
  for (const Format format : {kK2V2, kK4V4}) {
    for (const int head_dim : {80, 128}) {
      CacheSetup setup = make_setup(format, head_dim);
      CacheFixture plain(setup);
      plain.grow({160, 96});
      for (const float constant : {50.0f, 100.0f, 200.0f, 400.0f}) {
        SCOPED_TRACE(::testing::Message()
                     << name_of(format) << " head_dim " << head_dim << " constant " << constant);
        setup.constant = constant;
        CacheFixture shifted(setup);
        CacheFixture centered(setup);
        centered.center_constant();
        shifted.grow({160, 96});
        centered.grow({160, 96});
        EXPECT_NEAR(key_error(centered), key_error(plain), 0.01 * key_error(plain));
        EXPECT_GT(key_error(shifted), 1.5 * key_error(plain));
      }
    }
  }
}

// Rounding of float scores of several hundred is what is left: all backends sum them in float.
TEST_P(Center, AttendsToWhatTheTilesSay) {
  for (const Format format : kFormats) {
    for (const bool strict : {false, true}) {
      CacheSetup setup = make_setup(format, 112);
      setup.constant = 100.0f;
      CacheFixture fixture(setup);
      fixture.center_constant();
      fixture.grow({140, 90});
      const Call call = fixture.next({21, 7});
      if (strict) {
        ASSERT_TRUE(fixture.append(call, AppendPart::kPack).ok());
      }
      const Rows q = random_queries(fixture, call.tokens(), 10, DType::kF32, 7);
      const AttendOptions options{.scale = 1.0f / std::sqrt(112.0f), .strict = strict};
      const Result result = run_attend(fixture, call, q, options);
      ASSERT_TRUE(result.status.ok()) << result.status.message();
      const Expected expected = expected_attention(fixture, call, q, options);
      EXPECT_LE(output_error(result.out, expected), is_int8() ? 5e-2 : 1e-3);
      EXPECT_LE(lse_error(result.lse, expected), is_int8() ? 0.15 : 1e-3);
    }
  }
}

TEST_P(Center, OfZerosChangesNoBit) {
  for (const Format format : kFormats) {
    for (const float softcap : {0.0f, 20.0f}) {
      CacheFixture none(make_setup(format, 96));
      CacheFixture zeros(none);
      zeros.center.assign(2 * 96, 0.0f);
      none.grow({150, 64});
      zeros.grow({150, 64});
      EXPECT_TRUE(zeros.pages == none.pages);
      EXPECT_TRUE(zeros.exact == none.exact);
      const Call call = none.next({11, 3});
      const Rows q = random_queries(none, call.tokens(), 6, DType::kF32, 7);
      const AttendOptions options{.scale = 0.1f, .softcap = softcap};
      const Result expected = run_attend(none, call, q, options);
      const Result result = run_attend(zeros, call, q, options);
      EXPECT_EQ(result.lse, expected.lse);
      for (int token = 0; token < call.tokens(); ++token) {
        for (int head = 0; head < 6; ++head) {
          EXPECT_EQ(result.out.get(token, head), expected.out.get(token, head));
        }
      }
    }
  }
}

// Without a centre the mids are many times what the codes span. What the codes' 8 or 13 bits of
// query cost is at most 0.02 and 0.003 of a score here; mids that met a query of 8 bits were off by
// 0.5.
TEST_P(Center, LargeMidsMeetAnExactQuery) {
  for (const Format format : kFormats) {
    for (const int head_dim : {48, 128, 256}) {
      SCOPED_TRACE(::testing::Message() << name_of(format) << " head_dim " << head_dim);
      CacheSetup setup = make_setup(format, head_dim);
      setup.balance = false;
      setup.constant = 30.0f;
      CacheFixture fixture(setup);
      fixture.grow({160, 96});
      const Call call = fixture.next({1, 1});
      const Rows q = random_queries(fixture, 2, 32, DType::kF32, 7);
      const AttendOptions options{.scale = 1.0f / std::sqrt(static_cast<float>(head_dim))};
      const Result result = run_attend(fixture, call, q, options);
      ASSERT_TRUE(result.status.ok()) << result.status.message();
      const Expected expected = expected_attention(fixture, call, q, options);
      EXPECT_LE(output_error(result.out, expected), is_int8() ? 2e-2 : 2e-5);
      const double tolerance = !is_int8() ? 1e-4 : format == kK2V2 ? 0.03 : 0.006;
      EXPECT_LE(lse_error(result.lse, expected), tolerance);
    }
  }
}

OSCAR_FOR_ALL_BACKENDS(Center);

}  // namespace
}  // namespace oscar::testing
