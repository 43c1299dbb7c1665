// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "reference/page.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "oracle.hpp"
#include "support.hpp"

namespace oscar::reference {
namespace {

using testing::CacheFixture;
using testing::CacheSetup;

TEST(Page, WhichCopy) {
  Layout layout;
  layout.sinks = 4;
  // 3 tiles packed, 110 tokens cached.
  EXPECT_EQ(copy_of(layout, 0, 3, 110), Copy::kSink);
  EXPECT_EQ(copy_of(layout, 3, 3, 110), Copy::kSink);
  EXPECT_EQ(copy_of(layout, 4, 3, 110), Copy::kPacked);
  EXPECT_EQ(copy_of(layout, 95, 3, 110), Copy::kPacked);
  EXPECT_EQ(copy_of(layout, 96, 3, 110), Copy::kRing);
  EXPECT_EQ(copy_of(layout, 109, 3, 110), Copy::kRing);
  EXPECT_EQ(copy_of(layout, 110, 3, 110), Copy::kCall);
  // A first chunk: its own sinks are in the call; strict packs tiles of the call.
  EXPECT_EQ(copy_of(layout, 2, 2, 0), Copy::kCall);
  EXPECT_EQ(copy_of(layout, 40, 2, 0), Copy::kPacked);
  EXPECT_EQ(copy_of(layout, 64, 2, 0), Copy::kCall);
}

CacheSetup small_setup() {
  CacheSetup setup;
  setup.layout = {.kv_heads = 2,
                  .head_dim = 48,
                  .format = kK4V4,
                  .page_tokens = 64,
                  .window = 32,
                  .sinks = 4,
                  .exact_dtype = DType::kF16};
  setup.capacity = {150, 70};
  setup.dtype = DType::kF32;
  setup.balance = true;
  setup.center = 3.0f;
  return setup;
}

TEST(Page, DequantizeReadsTheRightCopy) {
  CacheFixture fixture(small_setup());
  fixture.grow({150, 70});
  fixture.forget(0, 128);
  std::vector<float> k(48);
  std::vector<float> v(48);
  std::vector<double> k_packed;
  std::vector<double> v_packed;
  for (int b = 0; b < 2; ++b) {
    for (int head = 0; head < 2; ++head) {
      for (int t = 0; t < fixture.seq_len[b]; ++t) {
        SCOPED_TRACE(::testing::Message() << "sequence " << b << " token " << t);
        dequantize(fixture.layout, fixture.view(), b, t, fixture.seq_len[b], head, k.data(),
                   v.data());
        // Sequence 0 has lost its ring below 128; of sequence 1 a query at 70 reads 1 tile packed.
        const bool packed = t >= 4 && t < (b == 0 ? 128 : 32);
        if (packed) testing::decode_token(fixture, b, head, t, k_packed, v_packed);
        for (int c = 0; c < 48; ++c) {
          const float key = testing::rounded(fixture.key(b, t, head)[c], DType::kF16);
          const float value = testing::rounded(fixture.value(b, t, head)[c], DType::kF16);
          if (packed) {
            ASSERT_NEAR(k[c], k_packed[c], 1e-5);
            ASSERT_NEAR(v[c], v_packed[c], 1e-5);
          } else {
            ASSERT_EQ(k[c], key);
            ASSERT_EQ(v[c], value);
          }
        }
      }
    }
  }
}

TEST(Page, DequantizeFollowsTheQueryPosition) {
  CacheFixture fixture(small_setup());
  fixture.grow({100, 70});
  std::vector<float> early_k(48);
  std::vector<float> late_k(48);
  std::vector<float> v(48);
  // Token 40 is in the second tile: packed for a query from 64 + 32 - 1 on.
  dequantize(fixture.layout, fixture.view(), 0, 40, 94, 0, early_k.data(), v.data());
  dequantize(fixture.layout, fixture.view(), 0, 40, 95, 0, late_k.data(), v.data());
  EXPECT_EQ(early_k[0], testing::rounded(fixture.key(0, 40, 0)[0], DType::kF16));
  EXPECT_NE(early_k, late_k);
}

}  // namespace
}  // namespace oscar::reference
