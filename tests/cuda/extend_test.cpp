// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// attend on the GPU with more than 8 query tokens a sequence, against dense float64 attention.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>

#include "support.hpp"

namespace oscar::testing {
namespace {

constexpr int kFewest = 9;  // query tokens that the extend path takes

class CudaExtend : public CudaTest {};

AttendShape extend_shape(int head_dim, int group, std::vector<int> history,
                         std::vector<int> counts) {
  AttendShape shape = attend_shape(kK2V2, head_dim, 1, group, DType::kF16);
  shape.history = std::move(history);
  shape.counts = std::move(counts);
  return shape;
}

class CudaExtendRandom : public CudaTest, public ::testing::WithParamInterface<int> {};

TEST_P(CudaExtendRandom, Shape) {
  const auto seed = static_cast<std::uint32_t>(GetParam());
  AttendShape shape = random_attend_shape(seed, kFewest + GetParam() % 40, 400);
  for (int& count : shape.counts) count = count == 0 ? 0 : std::max(count, kFewest);
  check_attend(shape);
}

INSTANTIATE_TEST_SUITE_P(Seeds, CudaExtendRandom, ::testing::Range(0, 120));

class CudaExtendHeadDim : public CudaTest, public ::testing::WithParamInterface<int> {};

TEST_P(CudaExtendHeadDim, EveryFormatAndDType) {
  for (const Format format : kFormats) {
    for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
      AttendShape shape = attend_shape(format, GetParam(), 2, 2, dtype);
      shape.history = {201};
      shape.counts = {19};
      shape.setup.balance = true;
      check_attend(shape);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Multiples, CudaExtendHeadDim,
                         ::testing::Range(kMinHeadDim, kMaxHeadDim + 1, kHeadDimStep));

TEST_F(CudaExtend, Centers) {
  int i = 0;
  for (const Format format : kFormats) {
    for (const int head_dim : {32, 64, 80, 128, 192, 256}) {
      ++i;
      AttendShape shape =
          attend_shape(format, head_dim, 2, 1 << i % 4, i % 2 == 0 ? DType::kF16 : DType::kBF16);
      shape.history = {330, 77, 0};
      shape.counts = {40, 20, 70};
      shape.options.strict = i % 3 == 0;
      for (const AttendShape& with : with_constants(shape)) check_attend(with);
    }
  }
}

TEST_F(CudaExtend, ZeroCenterIsNone) {
  for (const int head_dim : {64, 80, 128, 256}) {
    for (const float softcap : {0.0f, 30.0f}) {
      AttendShape shape = extend_shape(head_dim, 4, {700, 33}, {20, 11});
      shape.options.softcap = softcap;
      check_zero_center(shape);
    }
  }
}

TEST_F(CudaExtend, EveryGroupSize) {
  for (int group = 1; group <= 16; ++group) {
    check_attend(extend_shape(64, group, {150, 33}, {11, 9}));
  }
}

// The last block of 128 rows full, with one row too many, with one too few.
TEST_F(CudaExtend, RowBlockEdges) {
  for (const int tokens : {31, 32, 33, 127, 128, 129}) {
    check_attend(extend_shape(64, tokens < 64 ? 4 : 1, {97}, {tokens}));
  }
}

TEST_F(CudaExtend, EveryHistoryLengthAroundTwoTiles) {
  for (const bool strict : {false, true}) {
    AttendShape shape = extend_shape(64, 2, {}, {});
    for (int history = 0; history < 132; ++history) {
      shape.history.push_back(history);
      shape.counts.push_back(9 + history % 3);
    }
    shape.options.strict = strict;
    check_attend(shape);
  }
}

// A prompt without history, and a chunk longer than the ring: every boundary lies inside the call.
TEST_F(CudaExtend, LongChunks) {
  for (const bool strict : {false, true}) {
    AttendShape shape = extend_shape(128, 1, {0, 70}, {300, 260});
    shape.options.strict = strict;
    check_attend(shape);
  }
}

// Few rows and many tokens: the tokens are split over blocks, and combined.
TEST_F(CudaExtend, LongHistory) {
  for (const int head_dim : {64, 128, 256}) {
    AttendShape shape = extend_shape(head_dim, 4, {5000, 3, 2049}, {9, 20, 12});
    shape.sink_logits = {0.5f, -1.0f, 2.0f, 9.0f};
    check_attend(shape);
  }
}

TEST_F(CudaExtend, SequencesOfTheDecodePathBetween) {
  check_attend(extend_shape(128, 4, {100, 200, 64, 0, 31}, {1, 40, 8, 0, 9}));
}

TEST_F(CudaExtend, PeakedScores) {
  for (const float spread : {4.0f, 16.0f}) {
    AttendShape shape = extend_shape(128, 2, {300}, {20});
    shape.setup.layout.format = kK4V4;
    shape.options.softcap = 20.0f;
    shape.spread = spread;
    check_attend(shape);
  }
}

TEST_F(CudaExtend, NegativeAndZeroScale) {
  for (const float scale : {-0.1f, 0.0f}) {
    AttendShape shape = extend_shape(64, 2, {130}, {20});
    shape.options.scale = scale;
    check_attend(shape);
  }
}

// Powers of two are taken out of Q: neither the largest nor the smallest fp16 number is a limit.
TEST_F(CudaExtend, QueriesBeyondTheRangeOfFp16) {
  for (const float spread : {1e-12f, 1e8f}) {
    AttendShape shape = extend_shape(64, 2, {130}, {20});
    shape.q_dtype = DType::kF32;
    shape.spread = spread;
    shape.options.scale = 0.125f / spread;
    SCOPED_TRACE(spread);
    shape.out_dtype = DType::kF32;
    check_attend(shape);
  }
}

TEST_F(CudaExtend, TheSameBitsEveryTime) {
  const AttendShape shape = extend_shape(128, 4, {2000, 700}, {40, 130});
  CacheSetup setup = shape.setup;
  setup.capacity = {2040, 830};
  CacheFixture fixture(setup);
  fixture.grow(shape.history);
  const Call call = fixture.next(shape.counts);
  const Rows q = random_queries(fixture, call.tokens(), shape.q_heads, shape.q_dtype, 5);
  const Result first = run_attend_cuda(fixture, call, q, shape.options);
  for (int i = 0; i < 3; ++i) {
    const Result again = run_attend_cuda(fixture, call, q, shape.options);
    EXPECT_EQ(again.lse, first.lse);
    for (int t = 0; t < call.tokens(); ++t) {
      for (int head = 0; head < shape.q_heads; ++head) {
        ASSERT_EQ(again.out.get(t, head), first.out.get(t, head));
      }
    }
  }
}

// A captured call reads lengths and query_start when it is replayed.
TEST_F(CudaExtend, GraphReplayWithOtherLengths) {
  CacheSetup setup = attend_shape(kK2V2, 128, 2, 4, DType::kBF16).setup;
  setup.capacity = {400, 400};
  CacheFixture fixture(setup);
  fixture.grow({300, 330});
  const Call before = fixture.next({20, 40});
  Call after = before;
  after.query_start = {0, 45, 60};
  const Rows q = random_queries(fixture, 60, 8, DType::kBF16, 6);
  Result result{{}, Rows(DType::kBF16, 60, 8, 128), std::vector<float>(60 * 8)};
  const DeviceCache cache(fixture);
  const DeviceRows queries(q), k(before.k), v(before.v), out(result.out);
  DeviceMemory start = to_device(before.query_start);
  const DeviceMemory lse(result.lse.size() * sizeof(float));
  const DeviceMemory workspace(cuda::attend_workspace_bytes(fixture.layout, 2, 60, 8, 50));
  const AttendOptions options{.scale = 0.1f};
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  const Status status = cuda::attend(
      fixture.layout, cache.view(), {2, static_cast<const std::int32_t*>(start.data())},
      queries.view(), k.view(), v.view(), options, out.mutable_view(),
      static_cast<float*>(lse.data()), workspace.data(), workspace.size(), 50, stream);
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  start.upload(after.query_start.data(), start.size());
  ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
  check_device();
  out.download(result.out);
  lse.download(result.lse.data());
  const Result expected = run_attend_cuda(fixture, after, q, options, DType::kBF16, 50);
  EXPECT_EQ(result.lse, expected.lse);
  for (int t = 0; t < 60; ++t) {
    for (int head = 0; head < 8; ++head) {
      ASSERT_EQ(result.out.get(t, head), expected.out.get(t, head));
    }
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace oscar::testing
