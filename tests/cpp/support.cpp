// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
#include "support.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>

#include "core/rows.hpp"
#include "reference/rotate.hpp"

namespace oscar::testing {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr int kSpare = 3;  // pages and slots of nobody

std::vector<std::int32_t> shuffled(std::int64_t count, std::mt19937& random) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

std::int64_t pages_for(const CacheSetup& setup) {
  const int longest = *std::max_element(setup.capacity.begin(), setup.capacity.end());
  return std::max(1, (longest + setup.layout.page_tokens - 1) / setup.layout.page_tokens);
}

std::vector<float> normal_row(const Layout& layout, float size, std::uint32_t seed) {
  if (size == 0.0f) return {};
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, size);
  std::vector<float> row(static_cast<std::size_t>(layout.kv_heads * layout.head_dim));
  for (float& x : row) x = normal(random);
  return row;
}

// Normal numbers with what real K and V have: an offset a channel and a norm a token; all tokens
// share `constant`, if it is not empty.
std::vector<float> random_tokens(const CacheSetup& setup, int tokens, float offset,
                                 const std::vector<float>& constant, std::mt19937& random) {
  const int row = setup.layout.kv_heads * setup.layout.head_dim;
  std::normal_distribution<float> normal;
  std::vector<float> offsets(static_cast<std::size_t>(row));
  for (float& x : offsets) x = offset * normal(random);
  std::vector<float> values;
  values.reserve(static_cast<std::size_t>(tokens) * offsets.size());
  for (int t = 0; t < tokens; ++t) {
    const float norm = std::exp(0.3f * normal(random));
    for (std::size_t c = 0; c < offsets.size(); ++c) {
      const float x = norm * (offsets[c] + normal(random));
      values.push_back(rounded(constant.empty() ? x : x + constant[c], setup.dtype));
    }
  }
  return values;
}

}  // namespace

float rounded(float x, DType dtype) {
  std::byte bytes[sizeof(float)];
  store_row(&x, dtype, 1, bytes);
  load_row(bytes, dtype, 1, &x);
  return x;
}

Memory::Memory(std::size_t bytes)
    : bytes_(static_cast<std::uint8_t*>(::operator new(bytes, kAlignment))), size_(bytes) {
  std::memset(data(), 0xff, bytes);
}

Memory::Memory(const Memory& other) : Memory(other.size_) {
  std::memcpy(data(), other.data(), size_);
}

void Memory::Free::operator()(std::uint8_t* bytes) const { ::operator delete(bytes, kAlignment); }

bool operator==(const Memory& a, const Memory& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
}

Rows::Rows(DType dtype, std::int64_t tokens, int heads, int head_dim, int gap)
    : dtype_(dtype),
      tokens_(tokens),
      heads_(heads),
      head_dim_(head_dim),
      gap_(gap),
      memory_(size_of(dtype) * static_cast<std::size_t>(tokens * heads * (head_dim + gap))) {}

void Rows::set(std::int64_t token, int head, const float* values) {
  store_row(values, dtype_, head_dim_, mutable_view().row(token, head));
}

std::vector<float> Rows::get(std::int64_t token, int head) const {
  std::vector<float> values(static_cast<std::size_t>(head_dim_));
  load_row(view().row(token, head), dtype_, head_dim_, values.data());
  return values;
}

ConstRows Rows::view() const {
  const std::int64_t stride = head_dim_ + gap_;
  return {memory_.data(), dtype_, tokens_, heads_, heads_ * stride, stride};
}

MutableRows Rows::mutable_view() {
  const std::int64_t stride = head_dim_ + gap_;
  return {memory_.data(), dtype_, tokens_, heads_, heads_ * stride, stride};
}

bool Rows::gaps_untouched() const {
  const std::size_t gap_bytes = size_of(dtype_) * static_cast<std::size_t>(gap_);
  for (std::int64_t token = 0; token < tokens_; ++token) {
    for (int head = 0; head < heads_; ++head) {
      const std::byte* gap =
          view().row(token, head) + size_of(dtype_) * static_cast<std::size_t>(head_dim_);
      if (!std::all_of(gap, gap + gap_bytes, [](std::byte x) { return x == std::byte{0xff}; })) {
        return false;
      }
    }
  }
  return true;
}

CacheFixture::CacheFixture(const CacheSetup& given)
    : setup(given),
      layout(given.layout),
      num_pages(pages_for(given) * static_cast<std::int64_t>(given.capacity.size()) + kSpare),
      max_pages(pages_for(given)),
      slots(static_cast<std::int64_t>(given.capacity.size()) * layout.exact_blocks + kSpare),
      exact_stride(layout.exact_block_bytes() + setup.exact_gap),
      pages(static_cast<std::size_t>(num_pages * layout.page_bytes())),
      exact(static_cast<std::size_t>(slots * exact_stride)),
      seq_len(given.capacity.size(), 0),
      exact_from(given.capacity.size(), 0) {
  std::mt19937 random(given.seed);
  block_table = shuffled(num_pages, random);
  block_table.resize(static_cast<std::size_t>(max_pages) * seq_len.size());
  slot = shuffled(static_cast<std::int64_t>(given.capacity.size()) + kSpare, random);
  if (layout.exact_blocks > 1) {
    std::mt19937 other(given.seed);  // K and V stay those of one block
    slot = shuffled(slots, other);
  }
  slot.resize(seq_len.size() * static_cast<std::size_t>(layout.exact_blocks));
  if (given.balance) {
    std::uniform_real_distribution<float> octaves(-2.0f, 2.0f);
    balance.resize(static_cast<std::size_t>(layout.kv_heads * layout.head_dim));
    for (float& x : balance) x = std::exp2(octaves(random));
  }
  if (given.feedback) {
    // The lower triangle, too: nobody may read it.
    std::uniform_real_distribution<float> weight(-0.3f, 0.3f);
    feedback.resize(static_cast<std::size_t>(layout.kv_heads * layout.head_dim * layout.head_dim));
    for (std::uint16_t& x : feedback) x = float_to_fp16(weight(random));
  }
  // From seeds of their own: K and V stay those without.
  constant = normal_row(layout, given.constant, given.seed + 1);
  center = normal_row(layout, given.center, given.seed + 2);
  for (const int tokens : given.capacity) {
    keys_.push_back(random_tokens(given, tokens, 1.0f, constant, random));
    values_.push_back(random_tokens(given, tokens, 0.3f, {}, random));
  }
}

CacheView CacheFixture::view() {
  return {.pages = pages.data(),
          .num_pages = num_pages,
          .block_table = block_table.data(),
          .max_pages = max_pages,
          .exact = exact.data(),
          .slots = slots,
          .exact_stride = setup.exact_gap == 0 ? 0 : exact_stride,
          .slot = slot.data(),
          .seq_len = seq_len.data(),
          .exact_from = exact_from.data(),
          .balance = balance.empty() ? nullptr : balance.data(),
          .center = center.empty() ? nullptr : center.data(),
          .feedback = feedback.empty() ? nullptr : feedback.data()};
}

Call CacheFixture::next(const std::vector<int>& counts) const {
  std::vector<std::int32_t> start{0};
  for (const int count : counts) start.push_back(start.back() + count);
  Call call{start, Rows(setup.dtype, start.back(), layout.kv_heads, layout.head_dim, setup.gap),
            Rows(setup.dtype, start.back(), layout.kv_heads, layout.head_dim, setup.gap)};
  for (int b = 0; b < batch_size(); ++b) {
    for (int i = 0; i < counts[b]; ++i) {
      for (int head = 0; head < layout.kv_heads; ++head) {
        call.k.set(start[b] + i, head, key(b, seq_len[b] + i, head));
        call.v.set(start[b] + i, head, value(b, seq_len[b] + i, head));
      }
    }
  }
  return call;
}

Status CacheFixture::append(const Call& call, AppendPart part) {
  return oscar::append(layout, view(), call.batch(), call.k.view(), call.v.view(), part);
}

void CacheFixture::advance(const std::vector<int>& counts) {
  for (int b = 0; b < batch_size(); ++b) seq_len[b] += counts[b];
}

void CacheFixture::grow(const std::vector<int>& counts) {
  const Status status = append(next(counts));
  ASSERT_TRUE(status.ok()) << status.message();
  advance(counts);
}

void CacheFixture::forget(int b, int from) {
  exact_from[b] = from;
  const CacheView cache = view();
  const std::size_t bytes = size_of(layout.exact_dtype) * static_cast<std::size_t>(layout.head_dim);
  for (int position = std::max(0, seq_len[b] - layout.ring_tokens()); position < from; ++position) {
    for (int head = 0; head < layout.kv_heads; ++head) {
      for (const Side side : {Side::kKey, Side::kValue}) {
        std::memset(exact_row(layout, cache, b, side, head, ring_row(layout, position)), 0xff,
                    bytes);
      }
    }
  }
}

void CacheFixture::center_constant() {
  center = constant;
  for (int head = 0; head < layout.kv_heads; ++head) {
    reference::rotate_row(reference::Row::kKey, layout.head_dim,
                          head_values(view().balance, layout, head),
                          center.data() + head * layout.head_dim);
  }
}

const float* CacheFixture::key(int b, std::int64_t position, int kv_head) const {
  return &keys_[b].at(
      static_cast<std::size_t>((position * layout.kv_heads + kv_head) * layout.head_dim));
}

const float* CacheFixture::value(int b, std::int64_t position, int kv_head) const {
  return &values_[b].at(
      static_cast<std::size_t>((position * layout.kv_heads + kv_head) * layout.head_dim));
}

const std::uint8_t* CacheFixture::tile(int b, int kv_head, std::int64_t index) const {
  const std::int64_t page = block_table[b * max_pages + index * kTileTokens / layout.page_tokens];
  return pages.data() + page * layout.page_bytes() +
         (kv_head * layout.tiles_per_page() + index % layout.tiles_per_page()) *
             layout.tile().tile_bytes();
}

Result run_attend(CacheFixture& fixture, const Call& call, const Rows& q,
                  const AttendOptions& options, DType out_dtype) {
  const int q_heads = q.view().heads;
  Result result{{},
                Rows(out_dtype, call.tokens(), q_heads, fixture.layout.head_dim, fixture.setup.gap),
                std::vector<float>(static_cast<std::size_t>(call.tokens() * q_heads))};
  Memory workspace(
      attend_workspace_bytes(fixture.layout, call.batch().size, call.tokens(), q_heads));
  result.status = attend(fixture.layout, fixture.view(), call.batch(), q.view(), call.k.view(),
                         call.v.view(), options, result.out.mutable_view(), result.lse.data(),
                         workspace.data(), workspace.size());
  return result;
}

Rows random_queries(const CacheFixture& fixture, std::int64_t tokens, int q_heads, DType dtype,
                    std::uint32_t seed, float spread) {
  Rows q(dtype, tokens, q_heads, fixture.layout.head_dim, fixture.setup.gap);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> row(static_cast<std::size_t>(fixture.layout.head_dim));
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (int head = 0; head < q_heads; ++head) {
      for (float& x : row) x = normal(random);
      q.set(token, head, row.data());
    }
  }
  return q;
}

std::string backend_suffix(const ::testing::TestParamInfo<std::string_view>& info) {
  return std::string(info.param);
}

}  // namespace oscar::testing
