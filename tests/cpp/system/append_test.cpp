// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Every backend writes the bytes that the reference writes, and no others.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/rows.hpp"
#include "support.hpp"

namespace oscar::testing {
namespace {

constexpr int kTokenCounts[] = {0, 1, 31, 32, 33, 63, 64, 127, 128, 129};
constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

class Append : public BackendTest {
 protected:
  static void reference_grow(CacheFixture& fixture, const std::vector<int>& counts) {
    ASSERT_TRUE(set_backend("reference").ok());
    fixture.grow(counts);
    ASSERT_TRUE(set_backend(GetParam()).ok());
  }
  static void expect_same_bytes(const CacheFixture& a, const CacheFixture& b) {
    EXPECT_TRUE(a.pages == b.pages);
    EXPECT_TRUE(a.exact == b.exact);
  }
};

// Only for the backends that are not the reference themselves.
class AppendBytes : public Append {};

std::vector<std::string_view> fast_backends() {
  std::vector<std::string_view> names = available_backends();
  std::erase(names, "reference");
  return names;
}

CacheSetup make_setup(Format format, int head_dim, std::vector<int> tokens) {
  CacheSetup setup;
  setup.layout = {.kv_heads = 2,
                  .head_dim = head_dim,
                  .format = format,
                  .page_tokens = 64,
                  .window = 32,
                  .sinks = 4,
                  .exact_dtype = DType::kBF16};
  setup.capacity = std::move(tokens);
  setup.seed = static_cast<std::uint32_t>(head_dim);
  return setup;
}

std::string describe(const CacheSetup& setup) {
  const Layout& layout = setup.layout;
  return std::string(name_of(layout.format)) + " head_dim " + std::to_string(layout.head_dim) +
         " calls " + name_of(setup.dtype) + " exact " + name_of(layout.exact_dtype) + " center " +
         std::to_string(setup.center) + " seed " + std::to_string(setup.seed);
}

TEST_P(AppendBytes, EqualReference) {
  const std::vector<int> counts(std::begin(kTokenCounts), std::end(kTokenCounts));
  for (const Format format : kFormats) {
    for (const int head_dim : {32, 48, 64, 80, 96, 112, 128, 192, 256}) {
      for (int i = 0; i < 3; ++i) {
        CacheSetup setup = make_setup(format, head_dim, counts);
        setup.dtype = kDTypes[i];
        // Over the head dims every pair of dtypes comes up.
        setup.layout.exact_dtype = kDTypes[(i + head_dim / 16) % 3];
        setup.balance = (head_dim / 16 + i) % 2 == 1;
        setup.feedback = i == 1;
        setup.center = (head_dim / 16 + i) % 3 == 1 ? 2.0f : 0.0f;
        setup.constant = i == 2 ? 20.0f : 0.0f;
        setup.gap = i == 0 ? 8 : 0;
        SCOPED_TRACE(describe(setup));
        CacheFixture expected(setup);
        CacheFixture fixture(expected);
        reference_grow(expected, counts);
        fixture.grow(counts);
        expect_same_bytes(fixture, expected);
      }
    }
  }
}

// Sizes from 2^-30 to 2^15, zero tokens, zero channels, constant tokens, one-hot tokens.
TEST_P(AppendBytes, EqualReferenceAtExtremes) {
  for (const Format format : kFormats) {
    for (const int head_dim : {32, 80, 128}) {
      for (std::uint32_t seed = 0; seed < 8; ++seed) {
        CacheSetup setup = make_setup(format, head_dim, {64});
        setup.dtype = DType::kF32;
        setup.layout.exact_dtype = seed % 2 == 0 ? DType::kF32 : DType::kF16;
        setup.seed = seed;
        setup.center = seed % 3 == 2 ? std::exp2(5.0f * static_cast<float>(seed) - 20.0f) : 0.0f;
        SCOPED_TRACE(describe(setup));
        CacheFixture expected(setup);
        CacheFixture fixture(expected);
        Call call = fixture.next({64});
        std::mt19937 random(seed);
        std::uniform_real_distribution<float> octave(-30.0f, 12.0f);
        for (int t = 0; t < 64; ++t) {
          for (int head = 0; head < 2; ++head) {
            std::vector<float> k = call.k.get(t, head);
            std::vector<float> v = call.v.get(t, head);
            const float size = seed == 7 ? 0.0f : std::exp2(octave(random));
            for (int c = 0; c < head_dim; ++c) {
              const bool one_hot = t % 5 == 4 && c != t % head_dim;
              const float x = one_hot || t % 7 == 6 ? 0.0f : size;
              k[c] = t % 3 == 0 ? x : std::clamp(x * k[c], -kMaxInput, kMaxInput);
              v[c] = t % 3 == 1 ? x : std::clamp(x * v[c], -kMaxInput, kMaxInput);
            }
            if (seed == 6) std::fill(k.begin(), k.end(), t % 2 == 0 ? kMaxInput : -kMaxInput);
            if (seed == 5) std::fill(v.begin(), v.end(), kMaxInput);
            call.k.set(t, head, k.data());
            call.v.set(t, head, v.data());
          }
        }
        ASSERT_TRUE(set_backend("reference").ok());
        ASSERT_TRUE(expected.append(call).ok());
        ASSERT_TRUE(set_backend(GetParam()).ok());
        ASSERT_TRUE(fixture.append(call).ok());
        expect_same_bytes(fixture, expected);
      }
    }
  }
}

TEST_P(Append, ChunksGiveTheSameBytes) {
  for (const DType dtype : kDTypes) {
    CacheSetup setup = make_setup(kK2V2, 64, {200, 129, 31});
    setup.dtype = dtype;
    CacheFixture whole(setup);
    whole.grow({200, 129, 31});
    for (std::uint32_t seed = 0; seed < 4; ++seed) {
      SCOPED_TRACE(seed);
      CacheFixture pieces(setup);
      std::mt19937 random(seed);
      while (pieces.seq_len[0] < 200 || pieces.seq_len[1] < 129 || pieces.seq_len[2] < 31) {
        std::vector<int> counts;
        for (int b = 0; b < 3; ++b) {
          const int left = setup.capacity[b] - pieces.seq_len[b];
          counts.push_back(std::min(left, static_cast<int>(random() % (seed == 0 ? 2 : 70))));
        }
        pieces.grow(counts);
      }
      EXPECT_TRUE(pieces.pages == whole.pages);
      EXPECT_TRUE(pieces.exact == whole.exact);
    }
  }
}

TEST_P(Append, TwoPartsAreTheWhole) {
  const CacheSetup setup = make_setup(kK4V2, 96, {100, 40});
  CacheFixture whole(setup);
  CacheFixture parts(setup);
  for (const std::vector<int>& counts : {std::vector<int>{50, 40}, std::vector<int>{50, 0}}) {
    whole.grow(counts);
    const Call call = parts.next(counts);
    const Memory exact_before = parts.exact;
    ASSERT_TRUE(parts.append(call, AppendPart::kPack).ok());
    EXPECT_TRUE(parts.exact == exact_before) << "packing writes no rows";
    const Memory pages_before = parts.pages;
    ASSERT_TRUE(parts.append(call, AppendPart::kRemember).ok());
    EXPECT_TRUE(parts.pages == pages_before) << "remembering packs nothing";
    parts.advance(counts);
  }
  expect_same_bytes(parts, whole);
}

TEST_P(Append, RingAndSinksAreExact) {
  for (const int window : {0, 1, 32, 64}) {
    CacheSetup setup = make_setup(kK2V2, 48, {150, 3, 40});
    setup.layout.window = window;
    setup.dtype = DType::kF32;
    CacheFixture fixture(setup);
    fixture.grow({90, 3, 32});
    fixture.grow({60, 0, 8});
    const Layout& layout = fixture.layout;
    for (int b = 0; b < 3; ++b) {
      for (int t = 0; t < fixture.seq_len[b]; ++t) {
        for (int head = 0; head < 2; ++head) {
          for (const Side side : {Side::kKey, Side::kValue}) {
            SCOPED_TRACE(::testing::Message() << "window " << window << " token " << t);
            const float* row =
                side == Side::kKey ? fixture.key(b, t, head) : fixture.value(b, t, head);
            std::vector<std::byte> bytes(96);
            store_row(row, DType::kBF16, 48, bytes.data());
            const auto holds = [&](int index) {
              return std::memcmp(exact_row(layout, fixture.view(), b, side, head, index),
                                 bytes.data(), bytes.size()) == 0;
            };
            if (t >= fixture.seq_len[b] - layout.ring_tokens()) {
              ASSERT_TRUE(holds(ring_row(layout, t)));
            }
            if (t < layout.sinks) {
              ASSERT_TRUE(holds(sink_row(layout, t)));
            }
          }
        }
      }
    }
  }
}

TEST_P(Append, EmptyCallWritesNothing) {
  CacheFixture fixture(make_setup(kK2V2, 64, {64}));
  const Memory pages = fixture.pages;
  const Memory exact = fixture.exact;
  const Call call = fixture.next({0});
  ASSERT_TRUE(fixture.append(call).ok());
  EXPECT_TRUE(fixture.pages == pages);
  EXPECT_TRUE(fixture.exact == exact);
}

OSCAR_FOR_ALL_BACKENDS(Append);
INSTANTIATE_TEST_SUITE_P(Fast, AppendBytes, ::testing::ValuesIn(fast_backends()), backend_suffix);

}  // namespace
}  // namespace oscar::testing
