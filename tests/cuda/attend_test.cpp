// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The decode path (up to 8 query tokens a sequence) against dense float64 attention on the same
// codes.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "support.hpp"

namespace oscar::testing {
namespace {

class CudaAttend : public CudaTest {};

// Fewer where a checker makes every launch slow.
int scaled(int count) {
  const char* divisor = std::getenv("OSCAR_CUDA_TEST_DIVISOR");
  return std::max(1, count / (divisor == nullptr ? 1 : std::max(1, std::atoi(divisor))));
}

AttendShape decode_shape(Format format, int head_dim, int group, std::vector<int> history,
                         int queries = 1, DType dtype = DType::kF16) {
  AttendShape shape = attend_shape(format, head_dim, 2, group, dtype);
  shape.history = std::move(history);
  shape.counts.assign(shape.history.size(), queries);
  return shape;
}

TEST_F(CudaAttend, RandomShapes) {
  for (int i = 0; i < scaled(256) && !HasFailure(); ++i) {
    check_attend(random_attend_shape(static_cast<std::uint32_t>(i), i % 4 == 0 ? 8 : i % 4, 700));
  }
}

TEST_F(CudaAttend, EveryHistoryLengthAroundTwoTiles) {
  std::vector<int> history(140);
  std::iota(history.begin(), history.end(), 0);
  check_attend(decode_shape(kK2V2, 128, 4, history));
}

TEST_F(CudaAttend, HistoriesNextToTilesAndPages) {
  std::vector<int> history;
  for (const int edge : {32, 128, 256, 512, 1024}) {
    for (int i = -1; i <= 1; ++i) history.push_back(edge + i);
  }
  for (const int queries : {1, 8}) {
    for (const Format format : kFormats) {
      check_attend(decode_shape(format, 128, 4, history, queries));
    }
  }
}

TEST_F(CudaAttend, EveryHeadDim) {
  for (const Format format : kFormats) {
    for (int head_dim = kMinHeadDim; head_dim <= kMaxHeadDim; head_dim += kHeadDimStep) {
      check_attend(decode_shape(format, head_dim, 4, {330, 77}));
    }
  }
}

TEST_F(CudaAttend, EveryGroupSizeAndQueryLength) {
  for (int group = 1; group <= 16; ++group) {
    for (int queries = 1; queries <= 8; ++queries) {
      check_attend(decode_shape(kK2V2, group % 2 == 0 ? 128 : 64, group, {300, 95}, queries));
    }
  }
}

TEST_F(CudaAttend, EveryDType) {
  for (const DType exact : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const DType rows : {DType::kF32, DType::kF16, DType::kBF16}) {
      AttendShape shape = decode_shape(kK2V2, 128, 4, {500, 20}, 2, rows);
      shape.setup.layout.exact_dtype = exact;
      check_attend(shape);
    }
  }
}

// Of every head_dim and format some group sizes, query lengths and dtypes.
TEST_F(CudaAttend, Centers) {
  int i = 0;
  for (const Format format : kFormats) {
    for (const int head_dim : {32, 48, 64, 96, 112, 128, 192, 256}) {
      ++i;
      const AttendShape shape = decode_shape(format, head_dim, 1 << i % 5, {330, 77, 600},
                                             1 + i % 3, i % 2 == 0 ? DType::kF16 : DType::kBF16);
      for (const AttendShape& with : with_constants(shape)) check_attend(with);
    }
  }
}

TEST_F(CudaAttend, ZeroCenterIsNone) {
  for (const int head_dim : {64, 80, 128, 256}) {
    for (const float softcap : {0.0f, 30.0f}) {
      AttendShape shape = decode_shape(kK2V2, head_dim, 4, {700, 33}, 2);
      shape.options.softcap = softcap;
      shape.setup.balance = head_dim == 128;
      check_zero_center(shape);
    }
  }
}

// Longer than one part of the grid, and a batch of more sequences than one scan of the plan takes.
TEST_F(CudaAttend, LongAndRagged) {
  check_attend(decode_shape(kK2V2, 128, 4, {20000, 3, 4097}));
  std::vector<int> history;
  for (int b = 0; b < 75; ++b) history.push_back(b * 37 % 600);
  AttendShape shape = decode_shape(kK2V2, 64, 2, history);
  for (int b = 0; b < 75; b += 3) shape.counts[static_cast<std::size_t>(b)] = b % 9;
  check_attend(shape);
}

// More sequences than the plan has records: two share one, and blocks share items of either.
TEST_F(CudaAttend, MoreSequencesThanRecords) {
  std::vector<int> history;
  for (int b = 0; b < 300; ++b) history.push_back(b % 50 == 7 ? 1800 : b * 37 % 140);
  check_attend(decode_shape(kK2V2, 64, 2, history));
}

TEST_F(CudaAttend, PageSizes) {
  for (const int page_tokens : {32, 64, 96, 160, 256}) {
    AttendShape shape = decode_shape(kK2V2, 128, 4, {1500, 640, 161});
    shape.setup.layout.page_tokens = page_tokens;
    check_attend(shape);
  }
}

// The running maximum has to move often, and far.
TEST_F(CudaAttend, PeakedScores) {
  for (const float spread : {4.0f, 12.0f}) {
    AttendShape shape = decode_shape(kK4V4, 128, 8, {2000});
    shape.spread = spread;
    shape.options.softcap = 20.0f;
    check_attend(shape);
  }
}

TEST_F(CudaAttend, SameBitsEveryRun) {
  AttendShape shape = decode_shape(kK2V2, 128, 4, {7000, 130, 1, 999}, 3, DType::kBF16);
  shape.setup.capacity = {7003, 133, 4, 1002};
  CacheFixture fixture(shape.setup);
  fixture.grow(shape.history);
  const Call call = fixture.next(shape.counts);
  const Rows q = random_queries(fixture, call.tokens(), shape.q_heads, DType::kBF16, 5);
  const Result first = run_attend_cuda(fixture, call, q, shape.options, DType::kF32);
  for (int run = 0; run < scaled(20); ++run) {
    const Result again = run_attend_cuda(fixture, call, q, shape.options, DType::kF32);
    ASSERT_TRUE(same_bits(again, first, 128));
    ASSERT_EQ(again.lse, first.lse);
  }
}

void copy_to(const void* device, const void* host, std::size_t bytes) {
  ASSERT_EQ(cudaMemcpy(const_cast<void*>(device), host, bytes, cudaMemcpyHostToDevice),
            cudaSuccess);
}

// A graph captured at one length gives the right output at others, from the same addresses.
void check_graph(bool planned) {
  AttendShape shape = decode_shape(kK2V2, 128, 4, {40, 700, 3});
  shape.setup.capacity = {3000, 1500, 400};
  CacheFixture fixture(shape.setup);
  fixture.grow(shape.history);
  const DeviceCache cache(fixture);
  const Call first = fixture.next({1, 1, 1});
  const Rows first_q = random_queries(fixture, 3, shape.q_heads, DType::kF16, 1);
  const DeviceRows q(first_q), k(first.k), v(first.v);
  Rows output(DType::kF16, 3, shape.q_heads, 128);
  const DeviceRows out(output);
  const DeviceMemory start = to_device(first.query_start);
  const DeviceMemory workspace(
      cuda::attend_workspace_bytes(fixture.layout, 3, 3, shape.q_heads, 1));
  const DeviceMemory plan_memory(cuda::attend_plan_bytes());
  cuda::AttendPlan plan;
  const Batch batch{3, static_cast<const std::int32_t*>(start.data())};
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  if (planned) {
    const Status status =
        cuda::plan_attend(fixture.layout, cache.view(), batch, 3, shape.q_heads, shape.options,
                          plan_memory.data(), plan_memory.size(), 1, stream, plan);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  const Status status =
      cuda::attend(fixture.layout, cache.view(), batch, q.view(), k.view(), v.view(), shape.options,
                   out.mutable_view(), nullptr, workspace.data(), workspace.size(), 1, stream,
                   planned ? &plan : nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&replay, graph, 0), cudaSuccess);
  for (const int added : {0, 1, 25, 300, 60}) {
    fixture.grow({7 * added, 2 * added, added});
    const Call call = fixture.next({1, 1, 1});
    const Rows queries = random_queries(fixture, 3, shape.q_heads, DType::kF16,
                                        static_cast<std::uint32_t>(added) + 2);
    const CacheView view = cache.view();
    copy_to(view.pages, fixture.pages.data(), fixture.pages.size());
    copy_to(view.exact, fixture.exact.data(), fixture.exact.size());
    copy_to(view.seq_len, fixture.seq_len.data(), 3 * sizeof(std::int32_t));
    const std::size_t row = 128 * sizeof(std::uint16_t);
    copy_to(q.view().data, queries.view().data, 3 * static_cast<std::size_t>(shape.q_heads) * row);
    copy_to(k.view().data, call.k.view().data, 3 * 2 * row);
    copy_to(v.view().data, call.v.view().data, 3 * 2 * row);
    ASSERT_EQ(cudaGraphLaunch(replay, stream), cudaSuccess);
    check_device();
    out.download(output);
    const Expected expected = expected_attention(fixture, call, queries, shape.options);
    EXPECT_LE(output_error(output, expected), cuda_output_tolerance(shape)) << added;
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_F(CudaAttend, GraphReplaysWithOtherLengths) { check_graph(false); }

TEST_F(CudaAttend, GraphReplaysPlanForOtherLengths) { check_graph(true); }

// What a plan was made for is said where a call differs; nothing is launched.
TEST_F(CudaAttend, PlanOfAnotherCallIsRefused) {
  AttendShape shape = decode_shape(kK2V2, 128, 4, {40});
  shape.setup.capacity = {64};
  CacheFixture fixture(shape.setup);
  fixture.grow(shape.history);
  const DeviceCache cache(fixture);
  const Call call = fixture.next({1});
  const DeviceRows q(random_queries(fixture, 1, shape.q_heads, DType::kF16, 1)), k(call.k),
      v(call.v);
  const DeviceRows out(Rows(DType::kF16, 1, shape.q_heads, 128));
  const DeviceMemory start = to_device(call.query_start);
  const DeviceMemory workspace(
      cuda::attend_workspace_bytes(fixture.layout, 1, 1, shape.q_heads, 1));
  const DeviceMemory memory(cuda::attend_plan_bytes());
  const Batch batch{1, static_cast<const std::int32_t*>(start.data())};
  cuda::AttendPlan plan;
  const auto make = [&](int q_heads, std::size_t bytes, std::int64_t tokens) {
    return cuda::plan_attend(fixture.layout, cache.view(), batch, tokens, q_heads, shape.options,
                             memory.data(), bytes, 1, nullptr, plan);
  };
  const auto attend = [&](const AttendOptions& options) {
    return cuda::attend(fixture.layout, cache.view(), batch, q.view(), k.view(), v.view(), options,
                        out.mutable_view(), nullptr, workspace.data(), workspace.size(), 1, nullptr,
                        &plan);
  };
  EXPECT_EQ(make(shape.q_heads, memory.size() - 1, 1).message(),
            "memory_bytes is " + std::to_string(memory.size() - 1) + ", must be at least " +
                std::to_string(memory.size()));
  EXPECT_EQ(make(shape.q_heads, memory.size(), -1).message(),
            "query_tokens is -1, must be 0 to 2147483647");
  ASSERT_TRUE(make(2 * shape.q_heads, memory.size(), 1).ok());
  EXPECT_EQ(attend(shape.options).message(),
            "plan was made for q_heads " + std::to_string(2 * shape.q_heads) + ", this call has " +
                std::to_string(shape.q_heads));
  ASSERT_TRUE(make(shape.q_heads, memory.size(), 1).ok());
  EXPECT_TRUE(attend(shape.options).ok());
  AttendOptions other = shape.options;
  other.sliding_window = 8;
  EXPECT_EQ(attend(other).message(), "plan was made for sliding_window 0, this call has 8");
  other = shape.options;
  other.strict = true;
  EXPECT_EQ(attend(other).message(), "plan was made for strict 0, this call has 1");
  check_device();
}

}  // namespace
}  // namespace oscar::testing
