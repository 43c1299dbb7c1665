// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Packed tokens are summed in the rotated basis and exact ones in the original basis: two partial
// results, merged after the first has been rotated back.
#include <algorithm>
#include <cmath>

#include "core/rows.hpp"
#include "reference/combine.hpp"
#include "reference/pack.hpp"
#include "reference/page.hpp"
#include "reference/reference.hpp"
#include "reference/rotate.hpp"

namespace oscar::reference {
namespace {

constexpr int kMaxGroup = 16;  // query heads of a KV head

// The tokens that the query in row `row` of the call sees.
struct Query {
  int b;
  int kv_head;
  std::int64_t row;
  std::int64_t first_row;  // of the sequence
  std::int64_t cached;     // tokens before the call
  std::int64_t packed;     // tiles
  std::int64_t position;
  std::int64_t first;  // token
};

// One query head.
struct Head {
  double q[kMaxHeadDim];
  double q_rotated[kMaxHeadDim];
  Partial exact;
  Partial packed;
};

Query make_query(const AttendCall& call, int b, int kv_head, std::int64_t row) {
  const CacheView& cache = call.cache;
  const std::int64_t first_row = call.batch.query_start[b];
  const std::int64_t cached = cache.seq_len[b];
  const std::int64_t count = call.batch.query_start[b + 1] - first_row;
  const std::int64_t exact_from = cache.exact_from == nullptr ? 0 : cache.exact_from[b];
  const std::int64_t position = cached + row - first_row;
  const std::int64_t in_tiles = call.options.strict ? cached + count : cached;
  const std::int64_t window = call.options.sliding_window;
  return {.b = b,
          .kv_head = kv_head,
          .row = row,
          .first_row = first_row,
          .cached = cached,
          .packed = packed_tiles(call.layout, position, in_tiles, exact_from),
          .position = position,
          .first = window > 0 ? std::max<std::int64_t>(position - window + 1, 0) : 0};
}

double score_of(const AttendCall& call, const double* q, const double* k) {
  double dot = 0.0;
  for (int c = 0; c < call.layout.head_dim; ++c) dot += q[c] * k[c];
  const double score = call.options.scale * dot;
  const double cap = call.options.softcap;
  return cap > 0.0 ? cap * std::tanh(score / cap) : score;
}

void read_token(const AttendCall& call, const Query& query, Copy copy, std::int64_t position,
                double* k, double* v) {
  const int head_dim = call.layout.head_dim;
  float key[kMaxHeadDim];
  float value[kMaxHeadDim];
  if (copy == Copy::kCall) {
    const std::int64_t row = query.first_row + position - query.cached;
    load_row(call.k_new.row(row, query.kv_head), call.k_new.dtype, head_dim, key);
    load_row(call.v_new.row(row, query.kv_head), call.v_new.dtype, head_dim, value);
  } else {
    read_exact(call.layout, call.cache, query.b, query.kv_head, copy, position, key, value);
  }
  std::copy_n(key, head_dim, k);
  std::copy_n(value, head_dim, v);
}

void add_tokens(const AttendCall& call, const Query& query, int group, Head* heads) {
  const Layout& layout = call.layout;
  const float* center = head_values(call.cache.center, layout, query.kv_head);
  Tile tile;
  std::int64_t unpacked = -1;
  for (std::int64_t position = query.first; position <= query.position; ++position) {
    const Copy copy = copy_of(layout, position, query.packed, query.cached);
    double k[kMaxHeadDim];
    double v[kMaxHeadDim];
    if (copy == Copy::kPacked) {
      const std::int64_t index = position / kTileTokens;
      if (index != unpacked) {
        unpack(layout.tile(), tile_address(layout, call.cache, query.b, query.kv_head, index),
               tile);
        unpacked = index;
      }
      read_packed(layout.tile(), tile, center, static_cast<int>(position % kTileTokens), k, v);
    } else {
      read_token(call, query, copy, position, k, v);
    }
    for (int i = 0; i < group; ++i) {
      Head& head = heads[i];
      const bool packed = copy == Copy::kPacked;
      const double score = score_of(call, packed ? head.q_rotated : head.q, k);
      add_token(layout.head_dim, score, v, packed ? head.packed : head.exact);
    }
  }
}

void load_query(const AttendCall& call, const Query& query, int q_head, const float* balance,
                Head& head) {
  const int head_dim = call.layout.head_dim;
  float q[kMaxHeadDim];
  load_row(call.q.row(query.row, q_head), call.q.dtype, head_dim, q);
  std::copy_n(q, head_dim, head.q);
  std::copy_n(q, head_dim, head.q_rotated);
  rotate_row(Row::kQuery, head_dim, balance, head.q_rotated);
}

void store_output(const AttendCall& call, const Query& query, int q_head, Head& head) {
  const int head_dim = call.layout.head_dim;
  unrotate_row(Row::kValue, head_dim, nullptr, head.packed.out);
  merge(head_dim, head.packed, head.exact);
  if (call.options.sink_logits != nullptr) {
    add_token(head_dim, call.options.sink_logits[q_head], nullptr, head.exact);
  }
  double mean[kMaxHeadDim];
  const double lse = finish(head_dim, head.exact, mean);
  float out[kMaxHeadDim];
  std::copy_n(mean, head_dim, out);
  store_row(out, call.out.dtype, head_dim, call.out.row(query.row, q_head));
  if (call.lse != nullptr) {
    call.lse[query.row * call.q.heads + q_head] = static_cast<float>(lse);
  }
}

void attend_group(const AttendCall& call, const Query& query) {
  const int group = call.q.heads / call.layout.kv_heads;
  const float* balance = head_values(call.cache.balance, call.layout, query.kv_head);
  Head heads[kMaxGroup];
  for (int i = 0; i < group; ++i) {
    load_query(call, query, query.kv_head * group + i, balance, heads[i]);
  }
  add_tokens(call, query, group, heads);
  for (int i = 0; i < group; ++i) {
    store_output(call, query, query.kv_head * group + i, heads[i]);
  }
}

}  // namespace

void attend(const AttendCall& call) {
  for (int b = 0; b < call.batch.size; ++b) {
    for (std::int64_t row = call.batch.query_start[b]; row < call.batch.query_start[b + 1]; ++row) {
      for (int kv_head = 0; kv_head < call.layout.kv_heads; ++kv_head) {
        attend_group(call, make_query(call, b, kv_head, row));
      }
    }
  }
}

}  // namespace oscar::reference
