// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Time of one decode step of attention on packed caches of random contents, beside kernels that
// only read or copy the same bytes, in one process.
//
//   attend_bench [shape ...]      shape: batch x tokens [x head_dim [x group [x queries [x bits
//                                 [x center]]]]], bits 22, 42 or 44, center 0 or 1
//
// Every call is a replay of a captured graph and finds neither its data nor its own code in a
// cache, as between the other kernels of a model: a kernel of long code runs and a buffer four
// times the L2's size is read before it. One line a shape: median us, bytes, GB/s, the time over
// that of reading the bytes, the time with all of it in the caches, and that of the plan, which is
// made once a step and not part of the others.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench.cuh"
#include "oscar/cuda.hpp"

namespace {

using namespace oscar::bench;
using oscar::DType;

// Random codes, indices and mids; norms and scales of the size that real caches have.
__global__ void fill_tiles(std::uint8_t* tiles, std::int64_t count, oscar::TileLayout layout) {
  const int bytes = layout.tile_bytes();
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x;
       i < count * bytes; i += stride) {
    const int at = static_cast<int>(i % bytes);
    const std::uint32_t random = hashed(static_cast<std::uint64_t>(i));
    std::uint8_t value = static_cast<std::uint8_t>(random);
    if (at >= layout.v_scales_offset() && at < layout.v_mids_offset()) value = 120 + random % 16;
    if (at >= layout.v_mids_offset() && at < layout.k_norms_offset()) value = random % 33;
    if (at >= layout.k_norms_offset()) {
      constexpr std::uint32_t kUnits = 0x3f804000u;  // bf16 2 and 1
      value = 112 + random % 16 + (kUnits >> (at - layout.k_norms_offset()) % 32 & 1u) * 128;
    }
    if (at >= layout.used_bytes()) value = 0;
    tiles[i] = value;
  }
}

template <int kUnroll>
__global__ void __launch_bounds__(512)
    read_only(const uint4* data, std::int64_t count, uint4* sink) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x;
  uint4 sum{};
  for (; i + (kUnroll - 1) * stride < count; i += kUnroll * stride) {
    uint4 x[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) x[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      sum.x ^= x[j].x;
      sum.y ^= x[j].y;
      sum.z ^= x[j].z;
      sum.w ^= x[j].w;
    }
  }
  for (; i < count; i += stride) sum.x ^= data[i].x;
  if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x12345678u) *sink = sum;
}

struct Shape {
  int batch = 1;
  int tokens = 32768;
  int head_dim = 128;
  int group = 4;
  int queries = 1;
  oscar::Format format = oscar::kK2V2;
  bool center = false;
};

struct Case {
  explicit Case(const Shape& given)
      : shape(given),
        layout{.kv_heads = 8, .head_dim = given.head_dim, .format = given.format},
        max_pages((given.tokens + layout.page_tokens - 1) / layout.page_tokens),
        num_pages(static_cast<std::int64_t>(max_pages) * given.batch),
        query_tokens(static_cast<std::int64_t>(given.batch) * given.queries),
        pages(static_cast<std::size_t>(num_pages * layout.page_bytes())),
        exact(static_cast<std::size_t>(2 * given.batch * layout.kv_heads * layout.exact_rows() *
                                       given.head_dim * 2)),
        rows(static_cast<std::size_t>(query_tokens * (q_heads() + 2 * layout.kv_heads) *
                                      given.head_dim * 2)),
        out(static_cast<std::size_t>(query_tokens * q_heads() * given.head_dim * 2)),
        block_table(permutation(static_cast<int>(num_pages))),
        slot(permutation(given.batch)),
        seq_len(std::vector<std::int32_t>(static_cast<std::size_t>(given.batch), given.tokens)),
        query_start(starts()),
        center(static_cast<std::size_t>(layout.kv_heads * given.head_dim) * sizeof(float)),
        workspace(oscar::cuda::attend_workspace_bytes(layout, given.batch, query_tokens, q_heads(),
                                                      given.queries)),
        plan_memory(oscar::cuda::attend_plan_bytes()) {
    fill_tiles<<<1056, 512>>>(pages.as<std::uint8_t>(),
                              num_pages * layout.kv_heads * layout.tiles_per_page(), layout.tile());
    fill_rows<<<1056, 512>>>(exact.as<__nv_bfloat16>(),
                             static_cast<std::int64_t>(exact.size() / 2));
    fill_rows<<<1056, 512>>>(rows.as<__nv_bfloat16>(), static_cast<std::int64_t>(rows.size() / 2));
    check(cudaMemset(center.as<void>(), 0, center.size()));
    make_plan(nullptr);
    check(cudaDeviceSynchronize());
  }

  [[nodiscard]] int q_heads() const { return layout.kv_heads * shape.group; }
  static std::vector<std::int32_t> permutation(int count) {
    std::vector<std::int32_t> order(static_cast<std::size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    std::mt19937 random(1);
    std::shuffle(order.begin(), order.end(), random);
    return order;
  }
  [[nodiscard]] std::vector<std::int32_t> starts() const {
    std::vector<std::int32_t> start;
    for (int b = 0; b <= shape.batch; ++b) start.push_back(b * shape.queries);
    return start;
  }

  [[nodiscard]] oscar::CacheView cache() const {
    return {.pages = pages.as<std::uint8_t>(),
            .num_pages = num_pages,
            .block_table = block_table.as<std::int32_t>(),
            .max_pages = max_pages,
            .exact = exact.as<void>(),
            .slots = shape.batch,
            .slot = slot.as<std::int32_t>(),
            .seq_len = seq_len.as<std::int32_t>(),
            .center = shape.center ? center.as<float>() : nullptr};
  }
  [[nodiscard]] oscar::Batch batch() const { return {shape.batch, query_start.as<std::int32_t>()}; }

  // Once a step, for all layers.
  void make_plan(cudaStream_t stream) {
    check(oscar::cuda::plan_attend(layout, cache(), batch(), query_tokens, q_heads(), {},
                                   plan_memory.as<void>(), plan_memory.size(), shape.queries,
                                   stream, plan));
  }
  void attend(cudaStream_t stream) const {
    const std::int64_t dim = shape.head_dim;
    const auto view = [&](std::int64_t first_row, int heads) {
      return oscar::ConstRows{rows.as<std::uint16_t>() + first_row * dim,
                              DType::kBF16,
                              query_tokens,
                              heads,
                              heads * dim,
                              dim};
    };
    const oscar::ConstRows q = view(0, q_heads());
    const oscar::ConstRows k = view(query_tokens * q_heads(), layout.kv_heads);
    const oscar::ConstRows v = view(query_tokens * (q_heads() + layout.kv_heads), layout.kv_heads);
    const oscar::AttendOptions options{.scale = 0.0883883f};
    check(oscar::cuda::attend(
        layout, cache(), batch(), q, k, v, options,
        {out.as<void>(), DType::kBF16, query_tokens, q_heads(), q_heads() * dim, dim}, nullptr,
        workspace.as<void>(), workspace.size(), shape.queries, stream, &plan));
  }
  // What a step must read: packed tiles and exact tokens.
  [[nodiscard]] std::int64_t bytes() const {
    const std::int64_t packed = (shape.tokens + 1 - layout.window) / 32;
    const std::int64_t exact_tokens = shape.tokens - 32 * packed + layout.sinks;
    return static_cast<std::int64_t>(shape.batch) * layout.kv_heads *
           (packed * layout.tile().tile_bytes() + exact_tokens * 4 * shape.head_dim);
  }

  Shape shape;
  oscar::Layout layout;
  std::int32_t max_pages;
  std::int64_t num_pages;
  std::int64_t query_tokens;
  Buffer pages, exact, rows, out, block_table, slot, seq_len, query_start, center, workspace,
      plan_memory;
  oscar::cuda::AttendPlan plan;
};

void measure(const Shape& shape, const Buffer& flush) {
  Case data(shape);
  const std::int64_t bytes = data.bytes();
  const Buffer sink(sizeof(uint4)), copy(static_cast<std::size_t>(bytes));
  const std::int64_t count =
      std::min<std::int64_t>(bytes, static_cast<std::int64_t>(data.pages.size())) / 16;
  double read = 1e30;
  for (const int blocks : {132 * 2, 132 * 4}) {
    read = std::min(read, median_us(flush, [&](cudaStream_t stream) {
                      read_only<8><<<blocks, 512, 0, stream>>>(data.pages.as<uint4>(), count,
                                                               sink.as<uint4>());
                    }));
    read = std::min(read, median_us(flush, [&](cudaStream_t stream) {
                      read_only<4><<<blocks, 512, 0, stream>>>(data.pages.as<uint4>(), count,
                                                               sink.as<uint4>());
                    }));
  }
  const double copied = median_us(flush, [&](cudaStream_t stream) {
    check(cudaMemcpyAsync(copy.as<void>(), data.pages.as<void>(),
                          static_cast<std::size_t>(count) * 16, cudaMemcpyDeviceToDevice, stream));
  });
  const auto attend = [&](cudaStream_t stream) { data.attend(stream); };
  const double time = median_us(flush, attend);
  const double planned = median_us(flush, [&](cudaStream_t stream) { data.make_plan(stream); });
  const double warm = median_us(flush, attend, false);
  std::printf(
      "%3d x %6d  D %3d  group %2d  queries %d  %s%s  %8.1f us  %8.1f MB  %6.0f GB/s  "
      "read %8.1f us  (%4.1f %% of the bound)  copy %8.1f us  warm L2 %8.1f us  plan %5.1f us\n",
      shape.batch, shape.tokens, shape.head_dim, shape.group, shape.queries,
      oscar::name_of(shape.format), shape.center ? "  center" : "", time,
      static_cast<double>(bytes) * 1e-6, static_cast<double>(bytes) / time * 1e-3, read,
      100.0 * read / time, copied, warm, planned);
  std::fflush(stdout);
}

Shape parse(const char* text) {
  Shape shape;
  int bits = 22;
  int center = 0;
  const int count = std::sscanf(text, "%dx%dx%dx%dx%dx%dx%d", &shape.batch, &shape.tokens,
                                &shape.head_dim, &shape.group, &shape.queries, &bits, &center);
  if (count < 2) {
    std::fprintf(
        stderr, "shape %s: batch x tokens [x head_dim [x group [x queries [x bits [x center]]]]]\n",
        text);
    std::exit(2);
  }
  shape.center = center != 0;
  shape.format = {bits / 10, bits % 10};
  return shape;
}

}  // namespace

int main(int argc, char** argv) {
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  const Buffer flush(4 * static_cast<std::size_t>(device.l2CacheSize));
  std::vector<Shape> shapes;
  for (int i = 1; i < argc; ++i) shapes.push_back(parse(argv[i]));
  if (shapes.empty()) {
    shapes = {{1, 1024},   {1, 8192},  {1, 32768}, {1, 131072}, {8, 32768},
              {16, 16384}, {48, 4096}, {64, 8192}, {256, 2048}, {8, 131072}};
  }
  for (const Shape& shape : shapes) measure(shape, flush);
  return 0;
}
