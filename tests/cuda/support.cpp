// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "support.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace oscar::testing {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <typename T>
T pick(std::mt19937& random, std::initializer_list<T> choices) {
  return choices.begin()[random() % choices.size()];
}

int between(std::mt19937& random, int low, int high) {
  return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
}

// Anything, or a length next to the end of a tile or page.
int random_history(std::mt19937& random, int page_tokens, int longest) {
  const int any = between(random, 0, longest);
  const int edge = pick(random, {32, page_tokens});
  const int near = any / edge * edge + between(random, -1, 1);
  return std::max(0, pick(random, {any, near, near, between(random, 0, 33)}));
}

std::size_t row_bytes(const ConstRows& rows) {
  return size_of(rows.dtype) * static_cast<std::size_t>(rows.tokens * rows.token_stride);
}

void compare_codes(const std::uint8_t* a, const std::uint8_t* b, int bytes, int bits,
                   Difference& result) {
  for (int i = 0; i < bytes; ++i) {
    for (int shift = 0; shift < 8; shift += bits) {
      const int apart =
          std::abs((a[i] >> shift & max_code(bits)) - (b[i] >> shift & max_code(bits)));
      result.codes += apart > 0 ? 1 : 0;
      result.far_codes += apart > 1 ? 1 : 0;
      ++result.all_codes;
    }
  }
}

}  // namespace

DeviceMemory::DeviceMemory(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  check(cudaMalloc(&data_, bytes), "cudaMalloc");
  check(cudaMemset(data_, 0xff, bytes), "cudaMemset");
}

DeviceMemory::DeviceMemory(const void* host, std::size_t bytes) : DeviceMemory(bytes) {
  upload(host, bytes);
}

DeviceMemory::~DeviceMemory() { cudaFree(data_); }

void DeviceMemory::upload(const void* host, std::size_t bytes) {
  if (bytes > 0) check(cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice), "upload");
}

void DeviceMemory::download(void* host) const {
  if (size_ > 0) check(cudaMemcpy(host, data_, size_, cudaMemcpyDeviceToHost), "download");
}

DeviceRows::DeviceRows(const Rows& rows)
    : shape_(rows.view()), memory_(shape_.data, row_bytes(shape_)) {}

ConstRows DeviceRows::view() const {
  ConstRows view = shape_;
  view.data = memory_.data();
  return view;
}

MutableRows DeviceRows::mutable_view() const {
  return {memory_.data(), shape_.dtype,        shape_.tokens,
          shape_.heads,   shape_.token_stride, shape_.head_stride};
}

void DeviceRows::download(Rows& rows) const { memory_.download(rows.mutable_view().data); }

DeviceCache::DeviceCache(const CacheFixture& fixture)
    : pages_(fixture.pages.data(), fixture.pages.size()),
      exact_(fixture.exact.data(), fixture.exact.size()),
      block_table_(to_device(fixture.block_table)),
      slot_(to_device(fixture.slot)),
      seq_len_(to_device(fixture.seq_len)),
      exact_from_(to_device(fixture.exact_from)),
      balance_(to_device(fixture.balance)),
      center_(to_device(fixture.center)),
      feedback_(to_device(fixture.feedback)),
      view_{.pages = static_cast<std::uint8_t*>(pages_.data()),
            .num_pages = fixture.num_pages,
            .block_table = static_cast<const std::int32_t*>(block_table_.data()),
            .max_pages = fixture.max_pages,
            .exact = exact_.data(),
            .slots = fixture.slots,
            .slot = static_cast<const std::int32_t*>(slot_.data()),
            .seq_len = static_cast<const std::int32_t*>(seq_len_.data()),
            .exact_from = static_cast<const std::int32_t*>(exact_from_.data()),
            .balance = static_cast<const float*>(balance_.data()),
            .center = static_cast<const float*>(center_.data()),
            .feedback = static_cast<const std::uint16_t*>(feedback_.data())} {}

void DeviceCache::refresh(const CacheFixture& fixture) {
  seq_len_.upload(fixture.seq_len.data(), seq_len_.size());
  exact_from_.upload(fixture.exact_from.data(), exact_from_.size());
}

Memory DeviceCache::pages() const {
  Memory host(pages_.size());
  pages_.download(host.data());
  return host;
}

Memory DeviceCache::exact() const {
  Memory host(exact_.size());
  exact_.download(host.data());
  return host;
}

void check_device() {
  check(cudaGetLastError(), "launch");
  check(cudaDeviceSynchronize(), "kernel");
}

Difference compare(const CacheFixture& a, const CacheFixture& b) {
  Difference result;
  const TileLayout tile = a.layout.tile();
  const std::size_t bytes = static_cast<std::size_t>(tile.tile_bytes());
  for (std::size_t at = 0; at < a.pages.size(); at += bytes) {
    const std::uint8_t* x = a.pages.data() + at;
    const std::uint8_t* y = b.pages.data() + at;
    for (std::size_t i = 0; i < bytes; ++i) result.bytes += x[i] != y[i] ? 1 : 0;
    compare_codes(x, y, tile.k_code_bytes(), tile.format.k_bits, result);
    compare_codes(x + tile.v_codes_offset(), y + tile.v_codes_offset(), tile.v_code_bytes(),
                  tile.format.v_bits, result);
  }
  return result;
}

Result run_attend_cuda(const CacheFixture& fixture, const Call& call, const Rows& q,
                       const AttendOptions& options, DType out_dtype, int max_query_len,
                       bool planned) {
  const Layout& layout = fixture.layout;
  const int q_heads = q.view().heads;
  Result result{{},
                Rows(out_dtype, call.tokens(), q_heads, layout.head_dim, fixture.setup.gap),
                std::vector<float>(static_cast<std::size_t>(call.tokens() * q_heads))};
  const DeviceCache cache(fixture);
  const DeviceRows queries(q), k(call.k), v(call.v), out(result.out);
  const DeviceMemory start = to_device(call.query_start);
  const DeviceMemory lse(result.lse.size() * sizeof(float));
  const std::vector<float> logits(
      options.sink_logits, options.sink_logits + (options.sink_logits == nullptr ? 0 : q_heads));
  const DeviceMemory device_logits = to_device(logits);
  AttendOptions device_options = options;
  device_options.sink_logits = static_cast<const float*>(device_logits.data());
  const Batch batch{call.batch().size, static_cast<const std::int32_t*>(start.data())};
  const DeviceMemory workspace(
      cuda::attend_workspace_bytes(layout, batch.size, call.tokens(), q_heads, max_query_len));
  const DeviceMemory plan_memory(planned ? cuda::attend_plan_bytes() : 0);
  cuda::AttendPlan plan;
  if (planned) {
    result.status =
        cuda::plan_attend(layout, cache.view(), batch, call.tokens(), q_heads, options,
                          plan_memory.data(), plan_memory.size(), max_query_len, nullptr, plan);
    if (!result.status.ok()) return result;
  }
  result.status =
      cuda::attend(layout, cache.view(), batch, queries.view(), k.view(), v.view(), device_options,
                   out.mutable_view(), static_cast<float*>(lse.data()), workspace.data(),
                   workspace.size(), max_query_len, nullptr, planned ? &plan : nullptr);
  check_device();
  out.download(result.out);
  lse.download(result.lse.data());
  EXPECT_TRUE(cache.pages() == fixture.pages && cache.exact() == fixture.exact)
      << "attend wrote to the cache";
  return result;
}

std::string AttendShape::text() const {
  std::ostringstream s;
  const Layout& layout = setup.layout;
  s << name_of(layout.format) << " head_dim " << layout.head_dim << " heads " << q_heads << "/"
    << layout.kv_heads << " page " << layout.page_tokens << " window " << layout.window << " sinks "
    << layout.sinks << " exact " << name_of(layout.exact_dtype) << " k " << name_of(setup.dtype)
    << " q " << name_of(q_dtype) << " out " << name_of(out_dtype) << " gap " << setup.gap
    << " balance " << setup.balance << " constant " << setup.constant << " center " << setup.center
    << (center_constant ? " is the constant" : "") << " softcap " << options.softcap << " sliding "
    << options.sliding_window << " strict " << options.strict << " logits " << !sink_logits.empty()
    << " spread " << spread << " seed " << setup.seed;
  for (std::size_t b = 0; b < history.size(); ++b) {
    s << " [" << history[b] << "+" << counts[b];
    if (!lost.empty()) s << " from " << lost[b];
    s << "]";
  }
  return s.str();
}

AttendShape attend_shape(Format format, int head_dim, int kv_heads, int group, DType dtype) {
  AttendShape shape;
  shape.setup.layout.format = format;
  shape.setup.layout.head_dim = head_dim;
  shape.setup.layout.kv_heads = kv_heads;
  shape.setup.layout.exact_dtype = dtype;
  shape.setup.dtype = dtype;
  shape.q_heads = kv_heads * group;
  shape.q_dtype = dtype;
  shape.out_dtype = dtype;
  shape.options.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  return shape;
}

AttendShape random_attend_shape(std::uint32_t seed, int longest, int max_history) {
  std::mt19937 random(seed);
  const int head_dim = seed % 2 == 0 ? pick(random, {64, 128, 256}) : 16 * between(random, 2, 16);
  AttendShape shape =
      attend_shape(pick(random, {kK2V2, kK2V2, kK4V2, kK4V4}), head_dim, between(random, 1, 3),
                   between(random, 1, 16), pick(random, {DType::kF16, DType::kBF16}));
  Layout& layout = shape.setup.layout;
  layout.page_tokens = pick(random, {32, 64, 128});
  layout.window = pick(random, {0, 1, 32, 64});
  layout.sinks = pick(random, {0, 1, 4, 32});
  if (random() % 4 == 0) layout.exact_dtype = pick(random, {DType::kF32, DType::kF16});
  if (random() % 4 == 0) shape.q_dtype = DType::kF32;
  if (random() % 4 == 0) shape.setup.dtype = DType::kF32;
  if (random() % 4 == 0) shape.out_dtype = DType::kF32;
  shape.setup.balance = random() % 2 == 0;
  shape.setup.gap = pick(random, {0, 8});
  shape.setup.seed = seed;
  const int size = between(random, 1, 4);
  for (int b = 0; b < size; ++b) shape.counts.push_back(between(random, 0, longest));
  shape.counts[random() % shape.counts.size()] = longest;
  for (int b = 0; b < size; ++b) {
    const int history = random_history(random, layout.page_tokens, max_history);
    shape.history.push_back(history);
    const int open = history / kTileTokens * kTileTokens;
    shape.lost.push_back(random() % 3 == 0 ? between(random, 0, open) : 0);
  }
  shape.options.softcap = pick(random, {0.0f, 0.0f, 5.0f, 30.0f});
  shape.options.sliding_window = pick(random, {0, 0, 1, 7, 40, 128});
  shape.options.strict = random() % 2 == 0;
  if (random() % 3 == 0) {
    std::normal_distribution<float> normal(0.0f, 3.0f);
    for (int h = 0; h < shape.q_heads; ++h) shape.sink_logits.push_back(normal(random));
  }
  shape.spread = pick(random, {0.1f, 1.0f, 1.0f});
  if (random() % 3 == 0) shape.setup.center = 1.0f;
  if (random() % 4 == 0) {
    shape.setup.constant = 8.0f;
    shape.center_constant = random() % 2 == 0;
  }
  return shape;
}

// The operands are fp16, or bf16 where K, V or Q are: 2^-11 and 2^-8 an element, less on a sum.
double cuda_output_tolerance(const AttendShape& shape) {
  const bool any_bf16 = shape.q_dtype == DType::kBF16 || shape.setup.dtype == DType::kBF16 ||
                        shape.setup.layout.exact_dtype == DType::kBF16 ||
                        shape.out_dtype == DType::kBF16;
  return any_bf16 ? 6e-3 : 2e-3;
}

bool same_bits(const Result& a, const Result& b, int head_dim) {
  const ConstRows x = a.out.view(), y = b.out.view();
  const std::size_t row = size_of(x.dtype) * static_cast<std::size_t>(head_dim);
  for (std::int64_t token = 0; token < x.tokens; ++token) {
    for (std::int64_t head = 0; head < x.heads; ++head) {
      const std::int64_t at = token * x.token_stride + head * x.head_stride;
      const auto offset = at * static_cast<std::int64_t>(size_of(x.dtype));
      if (std::memcmp(static_cast<const std::byte*>(x.data) + offset,
                      static_cast<const std::byte*>(y.data) + offset, row) != 0) {
        return false;
      }
    }
  }
  return a.lse.size() == b.lse.size() &&
         std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * sizeof(float)) == 0;
}

// The constant part of packed keys meets a query in fp16: the score is off by some 2^-12 of it, the
// same for all of them, which moves weight to or from the exact ones. In the center it is exact,
// and so it is in exact tokens of 16 bits.
double constant_tolerance(const AttendShape& shape) {
  const CacheSetup& setup = shape.setup;
  const bool any_f32 = shape.q_dtype == DType::kF32 || setup.dtype == DType::kF32 ||
                       setup.layout.exact_dtype == DType::kF32;
  const double in_fp16 = setup.center + (shape.center_constant && !any_f32 ? 0 : setup.constant);
  return (setup.balance ? 6e-3 : 2e-3) * in_fp16 * shape.spread;
}

std::vector<AttendShape> with_constants(const AttendShape& shape) {
  std::vector<AttendShape> shapes(5, shape);
  shapes[0].setup.center = 1.0f;
  for (const int i : {1, 2, 3}) {
    shapes[i].setup.constant = i == 1 ? 400.0f : 50.0f;
    shapes[i].center_constant = true;
  }
  shapes[3].options.softcap = 20.0f;
  shapes[3].spread = 0.3f;
  shapes[4].setup.constant = 400.0f;
  shapes[4].spread = 0.05f;
  return shapes;
}

void check_zero_center(const AttendShape& shape) {
  SCOPED_TRACE(shape.text());
  CacheSetup setup = shape.setup;
  for (std::size_t b = 0; b < shape.history.size(); ++b) {
    setup.capacity.push_back(shape.history[b] + shape.counts[b]);
  }
  CacheFixture fixture(setup);
  fixture.grow(shape.history);
  const Call call = fixture.next(shape.counts);
  const Rows q = random_queries(fixture, call.tokens(), shape.q_heads, shape.q_dtype, 3);
  const Result none = run_attend_cuda(fixture, call, q, shape.options, shape.out_dtype);
  fixture.center.assign(static_cast<std::size_t>(setup.layout.kv_heads * setup.layout.head_dim),
                        0.0f);
  const Result zero = run_attend_cuda(fixture, call, q, shape.options, shape.out_dtype);
  EXPECT_TRUE(same_bits(zero, none, setup.layout.head_dim));
}

void check_attend(AttendShape shape) {
  SCOPED_TRACE(shape.text());
  shape.setup.capacity.clear();
  for (std::size_t b = 0; b < shape.history.size(); ++b) {
    shape.setup.capacity.push_back(shape.history[b] + shape.counts[b]);
  }
  shape.options.sink_logits = shape.sink_logits.empty() ? nullptr : shape.sink_logits.data();
  CacheFixture fixture(shape.setup);
  if (shape.center_constant) fixture.center_constant();
  fixture.grow(shape.history);
  for (std::size_t b = 0; b < shape.lost.size(); ++b) {
    fixture.forget(static_cast<int>(b), shape.lost[b]);
  }
  const Call call = fixture.next(shape.counts);
  if (shape.options.strict) {
    ASSERT_TRUE(fixture.append(call, AppendPart::kPack).ok());
  }
  const Rows q = random_queries(fixture, call.tokens(), shape.q_heads, shape.q_dtype,
                                shape.setup.seed + 1, shape.spread);
  const Result result =
      run_attend_cuda(fixture, call, q, shape.options, shape.out_dtype, shape.max_query_len);
  ASSERT_TRUE(result.status.ok()) << result.status.message();
  const Expected expected = expected_attention(fixture, call, q, shape.options);
  const double error = output_error(result.out, expected);
  const double lse = lse_error(result.lse, expected);
  ::testing::Test::RecordProperty("output_error", std::to_string(error));
  ::testing::Test::RecordProperty("lse_error", std::to_string(lse));
  EXPECT_LE(error, cuda_output_tolerance(shape) + constant_tolerance(shape));
  // Scores are off by what the operands are, times |Q| |K|, which balance makes larger.
  EXPECT_LE(lse, (shape.setup.balance ? 3e-2 : 1e-2) * std::max(1.0f, shape.spread) +
                     constant_tolerance(shape));
  EXPECT_TRUE(result.out.gaps_untouched());
  const Result planned =
      run_attend_cuda(fixture, call, q, shape.options, shape.out_dtype, shape.max_query_len, true);
  ASSERT_TRUE(planned.status.ok()) << planned.status.message();
  EXPECT_TRUE(same_bits(planned, result, shape.setup.layout.head_dim)) << "with a plan";
}

}  // namespace oscar::testing
