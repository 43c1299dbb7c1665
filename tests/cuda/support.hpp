// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The fixtures of tests/cpp/support.hpp on a GPU: a cache built by the CPU reference is copied to
// device memory, the CUDA call runs on the copy, and its result comes back for comparison.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../cpp/oracle.hpp"
#include "../cpp/support.hpp"
#include "oscar/cuda.hpp"

namespace oscar::testing {

// Device memory, all ones at first: NaN in every dtype. Errors throw std::runtime_error.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(std::size_t bytes);
  DeviceMemory(const void* host, std::size_t bytes);
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceMemory();

  void upload(const void* host, std::size_t bytes);
  void download(void* host) const;  // size() bytes
  [[nodiscard]] void* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

template <typename T>
DeviceMemory to_device(const std::vector<T>& values) {
  return DeviceMemory(values.data(), values.size() * sizeof(T));
}

// Rows with the same strides, gaps included.
class DeviceRows {
 public:
  explicit DeviceRows(const Rows& rows);
  [[nodiscard]] ConstRows view() const;
  [[nodiscard]] MutableRows mutable_view() const;
  void download(Rows& rows) const;

 private:
  ConstRows shape_;
  DeviceMemory memory_;
};

// Every array of a CacheFixture as it is now.
class DeviceCache {
 public:
  explicit DeviceCache(const CacheFixture& fixture);
  [[nodiscard]] CacheView view() const { return view_; }
  // Overwrites seq_len (and exact_from) with the fixture's present values, at the same addresses.
  void refresh(const CacheFixture& fixture);
  [[nodiscard]] Memory pages() const;
  [[nodiscard]] Memory exact() const;

 private:
  DeviceMemory pages_, exact_, block_table_, slot_, seq_len_, exact_from_, balance_, center_,
      feedback_;
  CacheView view_;
};

// Differences of two page memories: all bytes, and the codes among them by how far they are apart.
struct Difference {
  std::int64_t bytes = 0;
  std::int64_t codes = 0;
  std::int64_t far_codes = 0;
  std::int64_t all_codes = 0;
};

Difference compare(const CacheFixture& a, const CacheFixture& b);

// Waits for the device and throws the first error of any call before.
void check_device();

// One CUDA call on a copy of the fixture. max_query_len 0: the number of tokens. planned: after a
// plan_attend.
Result run_attend_cuda(const CacheFixture& fixture, const Call& call, const Rows& q,
                       const AttendOptions& options, DType out_dtype = DType::kF16,
                       int max_query_len = 0, bool planned = false);

// Whether outputs, gaps aside, and log-sum-exps are the same to the bit.
bool same_bits(const Result& a, const Result& b, int head_dim);

// A call of attend: what is in the cache, how many tokens come, and the options.
struct AttendShape {
  CacheSetup setup;  // capacity: filled in by `check_attend`
  int q_heads = 1;
  std::vector<int> history;
  std::vector<int> counts;
  std::vector<int> lost;  // exact_from, or empty
  AttendOptions options;
  std::vector<float> sink_logits;
  DType q_dtype = DType::kF16;
  DType out_dtype = DType::kF16;
  float spread = 1.0f;           // of q: 1 gives scores of the size 1
  bool center_constant = false;  // the center is the constant of the keys
  int max_query_len = 0;

  [[nodiscard]] std::string text() const;
};

// dtype of K, V, Q, the output and the exact memory; scale 1 / sqrt(head_dim).
AttendShape attend_shape(Format format, int head_dim, int kv_heads, int group, DType dtype);

// Random format, head_dim, GQA 1..16, page size, window, sinks, sliding window, soft cap, sink
// logits, balance, center, constant, strict, exact_from and dtype. counts are 0..longest, at least
// one of them `longest`; histories 0..max_history, many next to a multiple of 32 or of a page.
AttendShape random_attend_shape(std::uint32_t seed, int longest, int max_history);

// Builds the cache, runs CUDA on NaN-poisoned outputs and compares with dense float64 attention on
// the same codes: output, log-sum-exp, untouched gaps, an unchanged cache. With a plan it must give
// the same bits.
void check_attend(AttendShape shape);

// The shape with a center, and with keys whose constant part is many times the rest: all of it in
// the center, with a soft cap, and in the tiles.
std::vector<AttendShape> with_constants(const AttendShape& shape);

// A center of zeros must give the bits of none.
void check_zero_center(const AttendShape& shape);

// Relative error of the output that check_attend accepts, and what it adds, to that of the
// log-sum-exp, too, for what tiles hold of constant keys.
double cuda_output_tolerance(const AttendShape& shape);
double constant_tolerance(const AttendShape& shape);

// Every test of a suite derived from it is skipped where there is no usable GPU.
class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::available()) GTEST_SKIP() << "no usable CUDA device";
  }
};

}  // namespace oscar::testing
