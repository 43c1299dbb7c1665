// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Random shapes: every backend against dense float64 attention on the same codes.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>

#include "oracle.hpp"
#include "support.hpp"

namespace oscar::testing {
namespace {

class Attend : public BackendTest {};

template <typename T>
T pick(std::mt19937& random, std::initializer_list<T> choices) {
  return choices.begin()[random() % choices.size()];
}

int between(std::mt19937& random, int low, int high) {
  return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
}

DType any_dtype(std::mt19937& random) {
  return pick(random, {DType::kF32, DType::kF16, DType::kBF16});
}

struct Shape {
  CacheSetup setup;
  int q_heads = 1;
  std::vector<int> history;
  std::vector<int> counts;
  std::vector<int> lost;  // exact_from
  AttendOptions options;
  std::vector<float> sink_logits;
  DType q_dtype = DType::kF32;
  DType out_dtype = DType::kF32;
  float spread = 1.0f;

  [[nodiscard]] std::string text() const {
    std::ostringstream s;
    const Layout& layout = setup.layout;
    s << name_of(layout.format) << " head_dim " << layout.head_dim << " heads " << q_heads << "/"
      << layout.kv_heads << " page " << layout.page_tokens << " window " << layout.window
      << " sinks " << layout.sinks << " exact " << name_of(layout.exact_dtype) << " in "
      << layout.exact_blocks << " blocks, k " << name_of(setup.dtype) << " q " << name_of(q_dtype)
      << " out " << name_of(out_dtype) << " balance " << setup.balance << " center " << setup.center
      << " constant " << setup.constant << " softcap " << options.softcap << " sliding "
      << options.sliding_window << " strict " << options.strict << " logits "
      << !sink_logits.empty() << " spread " << spread;
    for (std::size_t b = 0; b < history.size(); ++b) {
      s << " [" << history[b] << "+" << counts[b] << " from " << lost[b] << "]";
    }
    return s.str();
  }
};

// Decode, a short burst, a chunk; the chunk not where the oracle would need seconds.
std::vector<int> query_counts(std::mt19937& random, int size, int row) {
  const int longest = pick(random, {1, 1, 5, row <= 2048 ? 40 : 12});
  std::vector<int> counts;
  for (int b = 0; b < size; ++b) counts.push_back(between(random, 0, longest));
  counts[random() % counts.size()] = longest;
  return counts;
}

Shape random_shape(std::uint32_t seed) {
  std::mt19937 random(seed);
  Shape shape;
  Layout& layout = shape.setup.layout;
  layout.kv_heads = between(random, 1, 3);
  layout.head_dim = seed % 2 == 0 ? pick(random, {64, 128, 256}) : 16 * between(random, 2, 16);
  layout.format = pick(random, {kK2V2, kK2V2, kK4V2, kK4V4});
  layout.page_tokens = pick(random, {32, 64, 128});
  layout.window = pick(random, {0, 1, 32, 64});
  layout.sinks = pick(random, {0, 1, 4, 32});
  layout.exact_dtype = any_dtype(random);
  shape.q_heads = layout.kv_heads * pick(random, {1, 2, 3, 4, 7, 8, 16});
  shape.setup.dtype = any_dtype(random);
  shape.setup.balance = random() % 2 == 0;
  shape.setup.gap = pick(random, {0, 8});
  shape.setup.seed = seed;
  const int size = between(random, 1, 4);
  shape.counts = query_counts(random, size, shape.q_heads * layout.head_dim);
  for (int b = 0; b < size; ++b) {
    const int history = random() % 5 == 0 ? 0 : between(random, 1, 300);
    shape.history.push_back(history);
    shape.setup.capacity.push_back(history + shape.counts[b]);
    const int open = history / kTileTokens * kTileTokens;
    shape.lost.push_back(random() % 3 == 0 ? between(random, 0, open) : 0);
  }
  shape.options.scale = 1.0f / std::sqrt(static_cast<float>(layout.head_dim));
  shape.options.softcap = pick(random, {0.0f, 0.0f, 5.0f, 30.0f});
  shape.options.sliding_window = pick(random, {0, 0, 1, 7, 40, 128});
  shape.options.strict = random() % 2 == 0;
  if (random() % 3 == 0) {
    std::normal_distribution<float> normal(0.0f, 3.0f);
    for (int h = 0; h < shape.q_heads; ++h) shape.sink_logits.push_back(normal(random));
  }
  shape.q_dtype = any_dtype(random);
  shape.out_dtype = any_dtype(random);
  shape.spread = pick(random, {0.1f, 1.0f, 1.0f, 4.0f});
  layout.exact_blocks = layout.sinks % 2 == 0 ? pick(random, {1, 2, 4}) : pick(random, {1, 2});
  shape.setup.exact_gap = pick(random, {0, 64});
  shape.setup.center = pick(random, {0.0f, 0.0f, 0.3f, 3.0f});
  return shape;
}

// Ten times what the float kernels were measured at. An int8 query is off by up to 1/254 of its
// largest channel in each channel: the error of a score, and with it of weights and output, grows
// with the scores. Measured over the random shapes: 4e-3 on average, at most 3.6e-2 (spread 1) and
// 5.2e-2 (spread 4).
double output_tolerance(bool is_int8, DType out_dtype, float spread = 1.0f) {
  const double rounding = out_dtype == DType::kBF16  ? 0x1p-8
                          : out_dtype == DType::kF16 ? 0x1p-11
                                                     : 0.0;
  return (is_int8 ? 5e-2 * std::max(1.0f, 0.5f * spread) : 2e-5) + rounding;
}

// Absolute, as scores are.
double lse_tolerance(bool is_int8, float spread) {
  return is_int8 ? 0.15 * std::max(1.0f, spread) : 3e-4;
}

void check_shape(Shape shape, bool is_int8) {
  SCOPED_TRACE(shape.text());
  shape.options.sink_logits = shape.sink_logits.empty() ? nullptr : shape.sink_logits.data();
  CacheFixture fixture(shape.setup);
  fixture.grow(shape.history);
  for (int b = 0; b < fixture.batch_size(); ++b) fixture.forget(b, shape.lost[b]);
  const Call call = fixture.next(shape.counts);
  if (shape.options.strict) {
    ASSERT_TRUE(fixture.append(call, AppendPart::kPack).ok());
  }
  const Rows q = random_queries(fixture, call.tokens(), shape.q_heads, shape.q_dtype,
                                shape.setup.seed + 1, shape.spread);
  const Memory pages = fixture.pages;
  const Memory exact = fixture.exact;
  const Result result = run_attend(fixture, call, q, shape.options, shape.out_dtype);
  ASSERT_TRUE(result.status.ok()) << result.status.message();
  const Expected expected = expected_attention(fixture, call, q, shape.options);
  EXPECT_LE(output_error(result.out, expected),
            output_tolerance(is_int8, shape.out_dtype, shape.spread));
  EXPECT_LE(lse_error(result.lse, expected), lse_tolerance(is_int8, shape.spread));
  EXPECT_TRUE(result.out.gaps_untouched());
  EXPECT_TRUE(fixture.pages == pages && fixture.exact == exact) << "attend wrote to the cache";
}

TEST_P(Attend, RandomShapes) {
  // The reference is the slow one, and the oracle is nearly the same arithmetic.
  const int count = GetParam() == "reference" ? OSCAR_TEST_SHAPES / 8 : OSCAR_TEST_SHAPES;
  for (int i = 0; i < count && !HasFailure(); ++i) {
    check_shape(random_shape(static_cast<std::uint32_t>(i)), is_int8());
  }
}

Shape decode_shape(int head_dim, std::vector<int> history) {
  Shape shape;
  shape.setup.layout.kv_heads = 1;
  shape.setup.layout.head_dim = head_dim;
  shape.history = std::move(history);
  for (const int tokens : shape.history) {
    shape.setup.capacity.push_back(tokens + 1);
    shape.counts.push_back(1);
    shape.lost.push_back(0);
  }
  shape.q_heads = 4;
  shape.options.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  return shape;
}

// Long enough that a split of the tokens over threads happens.
TEST_P(Attend, LongHistory) {
  for (const float center : {0.0f, 3.0f}) {
    for (const float softcap : {0.0f, 20.0f}) {
      Shape shape = decode_shape(128, {5000, 17, 2049});
      shape.setup.center = center;
      shape.options.softcap = softcap;
      check_shape(shape, is_int8());
    }
  }
}

TEST_P(Attend, EveryHistoryLengthAroundTwoTiles) {
  std::vector<int> history(140);
  std::iota(history.begin(), history.end(), 0);
  check_shape(decode_shape(64, std::move(history)), is_int8());
}

TEST_P(Attend, EveryHeadDim) {
  for (const Format format : kFormats) {
    for (int head_dim = kMinHeadDim; head_dim <= kMaxHeadDim; head_dim += kHeadDimStep) {
      Shape shape = decode_shape(head_dim, {130});
      shape.setup.layout.format = format;
      check_shape(shape, is_int8());
      shape.setup.center = 3.0f;
      check_shape(shape, is_int8());
    }
  }
}

TEST_P(Attend, EveryGroupSize) {
  for (int group = 1; group <= 16; ++group) {
    Shape shape = decode_shape(96, {200, 77});
    shape.setup.layout.kv_heads = 2;
    shape.q_heads = 2 * group;
    check_shape(shape, is_int8());
    shape.setup.center = 3.0f;
    shape.options.softcap = group % 2 == 0 ? 20.0f : 0.0f;
    shape.options.sliding_window = group % 3 == 0 ? 100 : 0;
    check_shape(shape, is_int8());
  }
}

// A score far above the others, early or late: the running maximum must move.
TEST_P(Attend, PeakedScores) {
  for (const float spread : {20.0f, 60.0f}) {
    Shape shape = decode_shape(64, {300});
    shape.setup.layout.format = kK4V4;
    shape.options.softcap = 20.0f;
    shape.spread = spread;
    SCOPED_TRACE(spread);
    if (!is_int8()) check_shape(shape, false);
    shape.spread = spread / 10;
    check_shape(shape, is_int8());
  }
}

// attend then append, token by token and in chunks: strict results do not depend on the cut.
TEST_P(Attend, StrictDoesNotDependOnTheCut) {
  CacheSetup setup;
  setup.layout.kv_heads = 2;
  setup.layout.head_dim = 64;
  setup.capacity = {200};
  const AttendOptions options{.scale = 0.125f, .strict = true};
  std::vector<std::vector<float>> outputs;
  for (const int chunk : {200, 64, 33, 1}) {
    CacheFixture fixture(setup);
    std::vector<float> output;
    const Rows queries = random_queries(fixture, 200, 4, DType::kF32, 9);
    while (fixture.seq_len[0] < 200) {
      const int first = fixture.seq_len[0];
      const int count = std::min(chunk, 200 - first);
      const Call call = fixture.next({count});
      Rows q(DType::kF32, count, 4, 64);
      for (int t = 0; t < count; ++t) {
        for (int head = 0; head < 4; ++head) q.set(t, head, queries.get(first + t, head).data());
      }
      ASSERT_TRUE(fixture.append(call, AppendPart::kPack).ok());
      const Result result = run_attend(fixture, call, q, options);
      ASSERT_TRUE(result.status.ok()) << result.status.message();
      ASSERT_TRUE(fixture.append(call, AppendPart::kRemember).ok());
      fixture.advance({count});
      for (int t = 0; t < count; ++t) {
        for (int head = 0; head < 4; ++head) {
          for (const float x : result.out.get(t, head)) output.push_back(x);
        }
      }
    }
    outputs.push_back(output);
  }
  for (std::size_t i = 1; i < outputs.size(); ++i) {
    double error = 0.0;
    double size = 0.0;
    for (std::size_t j = 0; j < outputs[0].size(); ++j) {
      error += std::pow(outputs[i][j] - outputs[0][j], 2);
      size += std::pow(outputs[0][j], 2);
    }
    EXPECT_LE(std::sqrt(error / size), output_tolerance(is_int8(), DType::kF32));
  }
}

TEST_P(Attend, LseMayBeNull) {
  const Shape shape = decode_shape(64, {100});
  CacheFixture fixture(shape.setup);
  fixture.grow(shape.history);
  const Call call = fixture.next({1});
  const Rows q = random_queries(fixture, 1, 4, DType::kF32, 3);
  const Result with = run_attend(fixture, call, q, shape.options);
  Rows out(DType::kF32, 1, 4, 64);
  Memory workspace(attend_workspace_bytes(fixture.layout, 1, 1, 4));
  ASSERT_TRUE(attend(fixture.layout, fixture.view(), call.batch(), q.view(), call.k.view(),
                     call.v.view(), shape.options, out.mutable_view(), nullptr, workspace.data(),
                     workspace.size())
                  .ok());
  for (int head = 0; head < 4; ++head) EXPECT_EQ(out.get(0, head), with.out.get(0, head));
}

OSCAR_FOR_ALL_BACKENDS(Attend);

}  // namespace
}  // namespace oscar::testing
