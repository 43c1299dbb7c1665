// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// A cache with its memory, for tests: a ragged batch whose pages and slots are in random order and
// whose unwritten bytes are all ones, which is NaN in every dtype.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "oscar/append.hpp"
#include "oscar/attend.hpp"
#include "oscar/backend.hpp"
#include "oscar/cache.hpp"

namespace oscar::testing {

// x as it is after a store in dtype.
float rounded(float x, DType dtype);

// Bytes at a 64-byte boundary, all ones at first. Not one byte more than asked for, so that the
// address sanitizer sees a read beyond the end.
class Memory {
 public:
  explicit Memory(std::size_t bytes);
  Memory(const Memory& other);
  Memory(Memory&&) = default;
  Memory& operator=(Memory&&) = default;
  [[nodiscard]] std::uint8_t* data() { return bytes_.get(); }
  [[nodiscard]] const std::uint8_t* data() const { return bytes_.get(); }
  [[nodiscard]] std::size_t size() const { return size_; }
  friend bool operator==(const Memory& a, const Memory& b);

 private:
  struct Free {
    void operator()(std::uint8_t* bytes) const;
  };
  std::unique_ptr<std::uint8_t, Free> bytes_;
  std::size_t size_;
};

// [tokens, heads, head_dim] with `gap` elements between two heads that nobody may touch.
class Rows {
 public:
  Rows(DType dtype, std::int64_t tokens, int heads, int head_dim, int gap = 0);
  void set(std::int64_t token, int head, const float* values);
  [[nodiscard]] std::vector<float> get(std::int64_t token, int head) const;
  [[nodiscard]] ConstRows view() const;
  [[nodiscard]] MutableRows mutable_view();
  [[nodiscard]] bool gaps_untouched() const;

 private:
  DType dtype_;
  std::int64_t tokens_;
  int heads_;
  int head_dim_;
  int gap_;
  Memory memory_;
};

struct CacheSetup {
  Layout layout;
  std::vector<int> capacity;   // tokens of each sequence over the whole test
  DType dtype = DType::kBF16;  // of k and v in the calls
  bool balance = false;
  bool feedback = false;
  float constant = 0.0f;  // of the keys: a vector a head that all tokens share, this size a channel
  float center = 0.0f;    // a random one of this size a channel; 0: none
  int gap = 0;
  int exact_gap = 0;  // bytes behind each slot of the exact memory
  std::uint32_t seed = 1;
};

// The arguments of one call that gives sequence b `counts[b]` more tokens.
struct Call {
  std::vector<std::int32_t> query_start;
  Rows k;
  Rows v;
  [[nodiscard]] Batch batch() const {
    return {static_cast<std::int32_t>(query_start.size()) - 1, query_start.data()};
  }
  [[nodiscard]] std::int64_t tokens() const { return query_start.back(); }
};

class CacheFixture {
 public:
  explicit CacheFixture(const CacheSetup& setup);

  [[nodiscard]] CacheView view();
  [[nodiscard]] Call next(const std::vector<int>& counts) const;
  Status append(const Call& call, AppendPart part = AppendPart::kBoth);
  void advance(const std::vector<int>& counts);
  // append and advance; fails the test on an error.
  void grow(const std::vector<int>& counts);
  // No ring copy of the tokens below `from` any more.
  void forget(int b, int from);
  // The centre that takes `constant` out of the keys.
  void center_constant();

  // K or V [head_dim] of any token, as the calls hold it.
  [[nodiscard]] const float* key(int b, std::int64_t position, int kv_head) const;
  [[nodiscard]] const float* value(int b, std::int64_t position, int kv_head) const;
  [[nodiscard]] int batch_size() const { return static_cast<int>(seq_len.size()); }
  [[nodiscard]] const std::uint8_t* tile(int b, int kv_head, std::int64_t index) const;

  const CacheSetup setup;
  const Layout layout;
  std::int64_t num_pages;
  std::int64_t max_pages;
  std::int64_t slots;
  std::int64_t exact_stride;
  Memory pages;
  Memory exact;
  std::vector<std::int32_t> block_table;
  std::vector<std::int32_t> slot;
  std::vector<std::int32_t> seq_len;
  std::vector<std::int32_t> exact_from;
  std::vector<float> balance;           // empty: none
  std::vector<float> center;            // empty: none
  std::vector<float> constant;          // [kv_heads, head_dim], as setup says; empty: none
  std::vector<std::uint16_t> feedback;  // empty: none

 private:
  std::vector<std::vector<float>> keys_;  // a sequence: [token, kv_head, head_dim]
  std::vector<std::vector<float>> values_;
};

struct Result {
  Status status;
  Rows out;
  std::vector<float> lse;
};
Result run_attend(CacheFixture& fixture, const Call& call, const Rows& q,
                  const AttendOptions& options, DType out_dtype = DType::kF32);

// q [tokens, q_heads, head_dim] of standard normal numbers times `spread`.
Rows random_queries(const CacheFixture& fixture, std::int64_t tokens, int q_heads, DType dtype,
                    std::uint32_t seed, float spread = 1.0f);

// Runs each test once for every backend of this machine.
class BackendTest : public ::testing::TestWithParam<std::string_view> {
 protected:
  void SetUp() override { ASSERT_TRUE(set_backend(GetParam()).ok()); }
  void TearDown() override { ASSERT_TRUE(set_backend("auto").ok()); }
  [[nodiscard]] static bool is_int8() {
    return GetParam() == "avx2" || GetParam() == "avx512vnni" || GetParam() == "neon";
  }
};
std::string backend_suffix(const ::testing::TestParamInfo<std::string_view>& info);

#define OSCAR_FOR_ALL_BACKENDS(suite)                                                      \
  INSTANTIATE_TEST_SUITE_P(All, suite, ::testing::ValuesIn(::oscar::available_backends()), \
                           ::oscar::testing::backend_suffix)

}  // namespace oscar::testing
