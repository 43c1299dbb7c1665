// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
#include "oracle.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

namespace oscar::testing {
namespace {

using Vector = std::vector<double>;

// The transform by its recursion: [[H, H], [H, -H]] / sqrt(2).
void hadamard(double* x, int size) {
  if (size == 1) return;
  const int half = size / 2;
  hadamard(x, half);
  hadamard(x + half, half);
  for (int i = 0; i < half; ++i) {
    const double a = x[i];
    const double b = x[i + half];
    x[i] = (a + b) * std::sqrt(0.5);
    x[i + half] = (a - b) * std::sqrt(0.5);
  }
}

void unrotate(Vector& x) {
  const int head_dim = static_cast<int>(x.size());
  int block = 1;
  while (head_dim % (2 * block) == 0) block *= 2;
  for (int c = 0; c < head_dim; c += block) hadamard(&x[c], block);
  for (int c = 0; c < head_dim; ++c) x[c] *= channel_sign(c);
}

double bf16_at(const std::uint8_t* bytes) {
  const std::uint32_t bits = bytes[0] * 0x10000u + bytes[1] * 0x1000000u;
  return std::bit_cast<float>(bits);
}

int k_code(const std::uint8_t* codes, int bits, int position, int c) {
  const int channels = 32 / bits;
  const std::uint8_t* word = codes + 4 * (c / channels * 32 + position);
  return word[c % 4] >> (bits * (c % channels / 4)) & ((1 << bits) - 1);
}

int v_code(const std::uint8_t* codes, int bits, int head_dim, int position, int c) {
  const int group = head_dim * bits / 8;
  const std::uint8_t* word = codes + 4 * (position / 4 * group + c % group);
  return word[position % 4] >> (bits * (c / group)) & ((1 << bits) - 1);
}

struct Token {
  Vector k;
  Vector v;
};
// Copies of the tokens of one KV head of one sequence.
using Tokens = std::vector<Token>;
// For a query at a position of sequence b: the copy of each of the tokens that it may see.
using Choose =
    std::function<const Token&(int b, int kv_head, std::int64_t position, std::int64_t query)>;

// Softmax over the scores of all visible tokens at once: the definition in attend.hpp.
class Dense {
 public:
  Dense(const CacheFixture& fixture, const Call& call, const Rows& q, const AttendOptions& options,
        Choose choose)
      : fixture_(fixture), call_(call), q_(q), options_(options), choose_(std::move(choose)) {}

  Expected run() {
    Expected result;
    for (int b = 0; b < fixture_.batch_size(); ++b) {
      for (int row = call_.query_start[b]; row < call_.query_start[b + 1]; ++row) {
        for (int head = 0; head < q_.view().heads; ++head) add_query(b, row, head, result);
      }
    }
    return result;
  }

 private:
  void add_query(int b, int row, int head, Expected& result) {
    const int group = q_.view().heads / fixture_.layout.kv_heads;
    const int kv_head = head / group;
    const std::int64_t query = fixture_.seq_len[b] + row - call_.query_start[b];
    if (head % group == 0) gather(b, kv_head, query);
    const std::vector<float> q = q_.get(row, head);
    Vector scores;
    for (const Token* token : visible_) {
      double dot = 0.0;
      for (std::size_t c = 0; c < q.size(); ++c) dot += q[c] * token->k[c];
      const double score = options_.scale * dot;
      const double cap = options_.softcap;
      scores.push_back(cap > 0 ? cap * std::tanh(score / cap) : score);
    }
    double top = *std::max_element(scores.begin(), scores.end());
    if (options_.sink_logits) top = std::max<double>(top, options_.sink_logits[head]);
    double sum = options_.sink_logits ? std::exp(options_.sink_logits[head] - top) : 0.0;
    for (const double score : scores) sum += std::exp(score - top);
    const double lse = top + std::log(sum);
    Vector out(q.size(), 0.0);
    for (std::size_t t = 0; t < scores.size(); ++t) {
      const double p = std::exp(scores[t] - lse);
      for (std::size_t c = 0; c < out.size(); ++c) out[c] += p * visible_[t]->v[c];
    }
    result.out.insert(result.out.end(), out.begin(), out.end());
    result.lse.push_back(lse);
  }

  void gather(int b, int kv_head, std::int64_t query) {
    visible_.clear();
    const std::int64_t window = options_.sliding_window;
    for (std::int64_t t = 0; t <= query; ++t) {
      if (window == 0 || t > query - window) visible_.push_back(&choose_(b, kv_head, t, query));
    }
  }

  const CacheFixture& fixture_;
  const Call& call_;
  const Rows& q_;
  const AttendOptions& options_;
  Choose choose_;
  std::vector<const Token*> visible_;
};

Vector widened(const float* row, int count, DType dtype) {
  Vector x(static_cast<std::size_t>(count));
  for (int c = 0; c < count; ++c) x[c] = rounded(row[c], dtype);
  return x;
}

// The first `count` tokens; those in the cache as the ring holds them, if `in_cache`.
Tokens exact_tokens(const CacheFixture& fixture, int b, int kv_head, int count, bool in_cache) {
  const int head_dim = fixture.layout.head_dim;
  Tokens tokens;
  for (int t = 0; t < count; ++t) {
    const bool in_ring = in_cache && t < fixture.seq_len[b];
    const DType dtype = in_ring ? fixture.layout.exact_dtype : fixture.setup.dtype;
    tokens.push_back({widened(fixture.key(b, t, kv_head), head_dim, dtype),
                      widened(fixture.value(b, t, kv_head), head_dim, dtype)});
  }
  return tokens;
}

// "Which copy a query reads" of docs/format.md, sentence by sentence.
bool reads_packed(const CacheFixture& fixture, int b, std::int64_t position, std::int64_t query,
                  std::int64_t tokens) {
  if (position < fixture.layout.sinks) return false;
  const std::int64_t end = 32 * (position / 32 + 1);
  if (end > tokens) return false;
  return end <= query + 1 - fixture.layout.window || end - 32 < fixture.exact_from[b];
}

}  // namespace

void decode_token(const CacheFixture& fixture, int b, int kv_head, std::int64_t position, Vector& k,
                  Vector& v) {
  const int head_dim = fixture.layout.head_dim;
  const auto [k_bits, v_bits] = fixture.layout.format;
  const std::uint8_t* k_codes = fixture.tile(b, kv_head, position / 32);
  const std::uint8_t* v_codes = k_codes + 4 * head_dim * k_bits;
  const std::uint8_t* k_params = v_codes + 4 * head_dim * v_bits;
  const std::uint8_t* v_scales = k_params + head_dim;
  const std::uint8_t* v_mids = v_scales + 32;
  const std::uint8_t* k_norms = v_mids + 32;
  std::uint8_t units[4] = {};
  for (int i = 0; i < 32; ++i) units[i / 8] += (k_norms[i] / 128) << i % 8;
  const double scale_unit = bf16_at(units) / 6;
  const double mid_unit = bf16_at(units + 2) / 31;
  const auto t = static_cast<int>(position % 32);
  const int p = 4 * (t % 8) + t / 8;
  const double norm = k_norms[p] % 128 == 0 ? 0.0 : std::exp2(k_norms[p] % 128 / 8.0 - 16);
  const double v_scale = v_scales[p] == 0 ? 0.0 : std::exp2(v_scales[p] / 8.0 - 16);
  const double v_mid = static_cast<std::int8_t>(v_mids[p]) / 64.0;
  k.resize(static_cast<std::size_t>(head_dim));
  v.resize(static_cast<std::size_t>(head_dim));
  for (int c = 0; c < head_dim; ++c) {
    const double k_step = k_code(k_codes, k_bits, p, c) - ((1 << k_bits) - 1) / 2.0;
    const double v_step = v_code(v_codes, v_bits, head_dim, p, c) - ((1 << v_bits) - 1) / 2.0;
    const int mid_index = k_params[c] % 64 - 31;
    constexpr double kScaleSteps[] = {2, 3, 4, 6};
    k[c] = norm * (mid_unit * mid_index + scale_unit * kScaleSteps[k_params[c] / 64] * k_step);
    if (!fixture.center.empty()) k[c] += fixture.center[kv_head * head_dim + c];
    v[c] = v_scale * (v_mid + v_step);
  }
  unrotate(k);
  unrotate(v);
  if (fixture.balance.empty()) return;
  for (int c = 0; c < head_dim; ++c) k[c] *= fixture.balance[kv_head * head_dim + c];
}

Expected expected_attention(const CacheFixture& fixture, const Call& call, const Rows& q,
                            const AttendOptions& options) {
  const int kv_heads = fixture.layout.kv_heads;
  std::vector<Tokens> packed;  // [b * kv_heads + kv_head]
  std::vector<Tokens> exact;
  std::vector<std::int64_t> in_tiles;
  for (int b = 0; b < fixture.batch_size(); ++b) {
    const int count = call.query_start[b + 1] - call.query_start[b];
    in_tiles.push_back(fixture.seq_len[b] + (options.strict ? count : 0));
    for (int head = 0; head < kv_heads; ++head) {
      packed.emplace_back();
      for (int t = 0; t < in_tiles.back() / 32 * 32; ++t) {
        packed.back().emplace_back();
        decode_token(fixture, b, head, t, packed.back().back().k, packed.back().back().v);
      }
      exact.push_back(exact_tokens(fixture, b, head, fixture.seq_len[b] + count, true));
    }
  }
  const auto choose = [&](int b, int head, std::int64_t t, std::int64_t query) -> const Token& {
    const bool from_tile = reads_packed(fixture, b, t, query, in_tiles[b]);
    return (from_tile ? packed : exact)[b * kv_heads + head][t];
  };
  return Dense(fixture, call, q, options, choose).run();
}

Expected exact_attention(const CacheFixture& fixture, const Call& call, const Rows& q,
                         const AttendOptions& options) {
  const int kv_heads = fixture.layout.kv_heads;
  std::vector<Tokens> exact;
  for (int b = 0; b < fixture.batch_size(); ++b) {
    const int count = call.query_start[b + 1] - call.query_start[b];
    for (int head = 0; head < kv_heads; ++head) {
      exact.push_back(exact_tokens(fixture, b, head, fixture.seq_len[b] + count, false));
    }
  }
  const auto choose = [&](int b, int head, std::int64_t t, std::int64_t) -> const Token& {
    return exact[b * kv_heads + head][t];
  };
  return Dense(fixture, call, q, options, choose).run();
}

double output_error(const Rows& out, const Expected& expected) {
  double error = 0.0;
  double size = 0.0;
  std::size_t i = 0;
  for (std::int64_t token = 0; token < out.view().tokens; ++token) {
    for (int head = 0; head < out.view().heads; ++head) {
      for (const float x : out.get(token, head)) {
        error += (x - expected.out[i]) * (x - expected.out[i]);
        size += expected.out[i] * expected.out[i];
        ++i;
      }
    }
  }
  return i == 0 ? 0.0 : std::sqrt(error / size);
}

double lse_error(const std::vector<float>& lse, const Expected& expected) {
  double error = 0.0;
  for (std::size_t i = 0; i < lse.size(); ++i) {
    // Written so that a NaN is an error, which std::max would drop.
    if (const double e = std::abs(lse[i] - expected.lse[i]); !(e <= error)) error = e;
  }
  return error;
}

}  // namespace oscar::testing
