// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// What compression costs on normal K and V with channel offsets and token norms (support.cpp):
// attention on the codes against attention on the input.
#include <cmath>

#include "oracle.hpp"
#include "support.hpp"

namespace oscar::testing {
namespace {

class Method : public BackendTest {};

struct Errors {
  double out;
  double lse;
};

Errors compression_error(Format format, int head_dim, float spread) {
  CacheSetup setup;
  setup.layout.kv_heads = 2;
  setup.layout.head_dim = head_dim;
  setup.layout.format = format;
  setup.layout.window = 0;
  setup.layout.sinks = 0;
  setup.capacity = {513, 513};
  setup.dtype = DType::kF32;
  setup.layout.exact_dtype = DType::kF32;
  CacheFixture fixture(setup);
  fixture.grow({512, 512});
  const Call call = fixture.next({1, 1});
  const Rows q = random_queries(fixture, 2, 8, DType::kF32, 11, spread);
  const AttendOptions options{.scale = 1.0f / std::sqrt(static_cast<float>(head_dim))};
  const Result result = run_attend(fixture, call, q, options);
  EXPECT_TRUE(result.status.ok()) << result.status.message();
  const Expected exact = exact_attention(fixture, call, q, options);
  return {output_error(result.out, exact), lse_error(result.lse, exact)};
}

TEST_P(Method, MoreBitsLessError) {
  for (const int head_dim : {64, 128}) {
    const Errors k2v2 = compression_error(kK2V2, head_dim, 1.0f);
    const Errors k4v2 = compression_error(kK4V2, head_dim, 1.0f);
    const Errors k4v4 = compression_error(kK4V4, head_dim, 1.0f);
    SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ": " << k2v2.out << " "
                                      << k4v2.out << " " << k4v4.out);
    EXPECT_LT(k2v2.out, 0.42);
    EXPECT_LT(k4v4.out, 0.11);
    EXPECT_LT(k4v4.out, k4v2.out);
    EXPECT_LT(k4v2.out, k2v2.out);
    EXPECT_LT(k2v2.lse, 1.0);
    EXPECT_LT(k4v4.lse, 0.15);
  }
}

OSCAR_FOR_ALL_BACKENDS(Method);

}  // namespace
}  // namespace oscar::testing
