// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// append of one tile by two warps (append_warp.cuh): 16 tokens each, in registers from the row to
// the code. rotate.cuh and pack.cuh have the order of the values.
#pragma once

#include <type_traits>

#include "cuda/feedback.cuh"
#include "cuda/pack.cuh"
#include "cuda/page.cuh"
#include "cuda/quantize.cuh"
#include "cuda/rotate.cuh"
#include "cuda/scale.cuh"

namespace oscar::cuda {

// One tile of a block.
struct TileTask {
  AppendSpan span;
  int head;
  int index;
  std::uint8_t* out;
  int exact_slot = 0;  // of the sequence, where load_rows takes one block of tokens
};

// What the two warps of a K tile exchange. Pair p = 8 line + g: channels c = g % 4 + 8 (g / 4) + 16
// line and c + 4 (rotate.cuh's x). The rows are padded against bank conflicts.
template <int kHeadDim>
struct KeyExchange {
  static constexpr int kLines = kHeadDim / 16;
  static constexpr int kPairs = kHeadDim / 2;
  union {
    float4 extremes[8][kPairs + 2];  // low, high, low, high over a lane's four tokens, by quad
    FeedbackLine line;               // once the extremes are known
  };
  union {
    float4 grids[8][kLines + 1];  // [g][line]: the two channels' Grids, as pack_keys wants them
    float4 channels[kHeadDim];    // as round_line wants them
  };
  float2 largest[2];    // step and |mid| of a warp's channels
  int largest_norm[2];  // index, of a warp's tokens
};

template <typename T>
inline constexpr std::uint32_t kLimitBits = std::is_same_v<T, __half> ? 0x7bffu : 0x477fu;
template <typename T>
inline constexpr std::uint32_t kInfinityBits = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;

template <typename T>
__device__ inline std::uint32_t max_magnitude(std::uint32_t a, std::uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const Pair larger =
      __hmax2_nan(*reinterpret_cast<const Pair*>(&a), __habs2(*reinterpret_cast<const Pair*>(&b)));
  return *reinterpret_cast<const std::uint32_t*>(&larger);
}

// Two 16-bit numbers: NaN to 0, others to at most the limit with their sign.
template <typename T>
__device__ inline std::uint32_t accepted_pair(std::uint32_t pair) {
  std::uint32_t result = 0;
#pragma unroll
  for (int shift = 0; shift < 32; shift += 16) {
    const std::uint32_t x = pair >> shift & 0xffffu;
    const std::uint32_t bounded = (x & 0x8000u) | min(x & 0x7fffu, kLimitBits<T>);
    result |= ((x & 0x7fffu) > kInfinityBits<T> ? 0u : bounded) << shift;
  }
  return result;
}

// This lane's pieces of the rows of two tokens.
template <Side kSide, typename T, int kHeadDim, int kBlocks>
__device__ inline void load_rows(const CudaAppendCall& call, const TileTask& task, TileLane place,
                                 uint4 (&raw)[kBlocks][kHeadDim / 32]) {
  const ConstRows& rows = kSide == Side::kKey ? call.k : call.v;
  const int first = task.index * kTileTokens;
  const int row = task.span.first_row + first - task.span.cached;
  const T* base = static_cast<const T*>(rows.data) + task.head * rows.head_stride;
#pragma unroll
  for (int t = 0; t < kBlocks; ++t) {
    const int token = place.loaded_token(t);
    const void* from = base + (row + token) * rows.token_stride;
    if (first < task.span.cached) {
      if (kBlocks == 2 || first + token >= task.span.cached) {
        from = token_row(call, task.span, kSide, task.head, first + token).data;
      } else {  // the slot is known: one trip to memory less
        from = exact_address(call.layout, call.cache, task.span.b, task.exact_slot, kSide,
                             task.head, ring_row(call.layout, first + token));
      }
    }
    const auto* pieces = static_cast<const uint4*>(from) + place.q();
#pragma unroll
    for (int r = 0; r < kHeadDim / 32; ++r) raw[t][r] = pieces[4 * r];
  }
  std::uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kBlocks * kHeadDim / 32; ++i) {
    const uint4& w = raw[i % kBlocks][i / kBlocks];
    largest = max_magnitude<T>(largest, w.x);
    largest = max_magnitude<T>(largest, w.y);
    largest = max_magnitude<T>(largest, w.z);
    largest = max_magnitude<T>(largest, w.w);
  }
  if (max(largest & 0xffffu, largest >> 16) <= kLimitBits<T>) return;
#pragma unroll
  for (int t = 0; t < kBlocks; ++t) {
    const int token = place.loaded_token(t);
    if (first + token < task.span.cached) continue;  // the ring has been through here before
    std::uint32_t changed = 0;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      std::uint32_t& word = (&raw[t][i / 4].x)[i % 4];
      const std::uint32_t old = word;
      word = accepted_pair<T>(old);
      changed |= old ^ word;
    }
    if (changed != 0) report_fault(call.fault, kSide, task.head, row + token);
  }
}

// The center's channels that this lane has of K (rotate.cuh), [2 line + x].
template <int kHeadDim>
__device__ inline void load_center(const float* center, TileLane place,
                                   float (&own)[kHeadDim / 8]) {
  center += place.g() % 4 + 8 * (place.g() / 4);
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) own[i] = center[16 * (i / 2) + 4 * (i % 2)];
}
template <int kHeadDim, int kBlocks>
__device__ inline void subtract_center(const float (&own)[kHeadDim / 8],
                                       Rotated<kHeadDim, kBlocks>& y) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) {
    const int line = i / 2;
#pragma unroll
    for (int b = 0; b < 2 * kBlocks; ++b) {
      y[i % 2 + line / 2 * 2][b / 2][line % 2 * 2 + b % 2] -= own[i];
    }
  }
}

// values[g % 4] of this lane: lanes g look after one of their quad's four tokens each.
__device__ inline float own_of(const float (&values)[4], int lane) {
  const float low = (lane & 4) != 0 ? values[1] : values[0];
  const float high = (lane & 4) != 0 ? values[3] : values[2];
  return (lane & 8) != 0 ? high : low;
}
// The value of the lane that looks after token b.
__device__ inline float of_token(float value, int lane, int b) {
  return __shfl_sync(kAllLanes, value, 4 * b + lane % 4);
}

// A token's sum of squares in the order of the format: channels l, l + 16, ... then l + 8 (g / 4),
// l + 4 (x), l + 2 and l + 1 (g). value(x, line): of this lane.
template <int kHeadDim, typename Value>
__device__ inline float sum_of_squares(const Value& value) {
  float part[2] = {};
#pragma unroll
  for (int x = 0; x < 2; ++x) {
#pragma unroll
    for (int line = 0; line < kHeadDim / 16; ++line) {
      const float own = value(x, line);
      part[x] = line == 0 ? own * own : part[x] + own * own;
    }
    part[x] += __shfl_xor_sync(kAllLanes, part[x], 16);
  }
  float sum = part[0] + part[1];
  sum += __shfl_xor_sync(kAllLanes, sum, 8);
  return sum + __shfl_xor_sync(kAllLanes, sum, 4);
}

// y becomes z; returns the norm index of the lane's own token, that of position 4 quad + g % 4.
template <int kHeadDim>
__device__ inline int scale_keys(Rotated<kHeadDim>& y, TileLane place) {
  float sums[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    sums[b] = sum_of_squares<kHeadDim>(
        [&](int x, int line) { return at<kHeadDim>(y, x, line % 2, line / 2, b); });
  }
  // head_dim is a power of two here: the product is the quotient.
  const int index = norm_index(own_of(sums, place.lane) * (1.0f / static_cast<float>(kHeadDim)));
  const float mine = inverse_scale_of(index, kTokenNormOffset);
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const float inverse = of_token(mine, place.lane, b);
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) at<kHeadDim>(y, i % 2, i / 2 % 2, i / 4, b) *= inverse;
  }
  return index;
}

// Extremes of this lane's channels over its four tokens, for the tile's other lanes to see.
template <int kHeadDim>
__device__ inline void publish_extremes(const Rotated<kHeadDim>& z, TileLane place,
                                        KeyExchange<kHeadDim>& exchange) {
#pragma unroll
  for (int line = 0; line < kHeadDim / 16; ++line) {
    float low[2];
    float high[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const auto of = [&](int b) { return at<kHeadDim>(z, x, line % 2, line / 2, b); };
      low[x] = fminf(fminf(of(0), of(1)), fminf(of(2), of(3)));
      high[x] = fmaxf(fmaxf(of(0), of(1)), fmaxf(of(2), of(3)));
    }
    exchange.extremes[place.quad()][8 * line + place.g()] =
        make_float4(low[0], high[0], low[1], high[1]);
  }
}

// Scale and mid of every channel of the tile: thread t takes pair t (and t + 64, ...). kFed: into
// exchange.channels instead of grids. Then the norms' bytes, whose units are known here; norm: the
// index of the lane's own token (scale_keys).
template <int kHeadDim, int kBits, bool kFed>
__device__ inline void key_grids(int norm, TileLane place, KeyExchange<kHeadDim>& exchange,
                                 const TileLayout& layout, std::uint8_t* out) {
  constexpr int kPairs = KeyExchange<kHeadDim>::kPairs;
  constexpr int kOwn = (kPairs + kTileThreads - 1) / kTileThreads;
  const int thread = place.thread();
  float steps[kOwn][2] = {};
  float mids[kOwn][2] = {};
  float2 largest = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const int pair = thread + k * kTileThreads;
    if (pair >= kPairs) break;
    float4 all = exchange.extremes[0][pair];
#pragma unroll
    for (int i = 1; i < 8; ++i) {
      const float4 next = exchange.extremes[i][pair];
      all = make_float4(fminf(all.x, next.x), fmaxf(all.y, next.y), fminf(all.z, next.z),
                        fmaxf(all.w, next.w));
    }
    steps[k][0] = key_step<kBits>(all.x, all.y, kFed);
    steps[k][1] = key_step<kBits>(all.z, all.w, kFed);
    mids[k][0] = middle(all.x, all.y);
    mids[k][1] = middle(all.z, all.w);
    largest.x = fmaxf(largest.x, fmaxf(steps[k][0], steps[k][1]));
    largest.y = fmaxf(largest.y, fmaxf(fabsf(mids[k][0]), fabsf(mids[k][1])));
  }
  // Neither is negative: their bits are in the order of the numbers.
  largest.x = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(largest.x)));
  largest.y = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(largest.y)));
  const int largest_norm = __reduce_max_sync(kAllLanes, norm);
  if (place.lane == 0) {
    exchange.largest[place.warp] = largest;
    exchange.largest_norm[place.warp] = largest_norm;
  }
  place.sync();
  const float2 other = exchange.largest[1 - place.warp];
  const KeyTop top = key_top<kBits>(fmaxf(largest.x, other.x), fmaxf(largest.y, other.y));
  if (place.g() < 4) {
    const int top_norm = max(largest_norm, exchange.largest_norm[1 - place.warp]);
    const int position = 4 * place.quad() + place.g();
    out[layout.k_norms_offset() + position] =
        norm_byte(norm, top_norm, unit_bits(top, top_norm), position);
  }
  for (int i = layout.used_bytes() + thread; i < layout.tile_bytes(); i += kTileThreads) out[i] = 0;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const int pair = thread + k * kTileThreads;
    if (pair >= kPairs) break;
    const int g = pair % 8;
    const int line = pair / 8;
    Grid grids[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int channel = 16 * line + g % 4 + 4 * x + g / 4 * 8;
      float scale = 0.0f;
      out[layout.k_params_offset() + channel] = static_cast<std::uint8_t>(
          key_params<kBits>(steps[k][x], mids[k][x], top, &grids[x], &scale));
      grids[x].inverse *= kCodeStep<kBits>;
      if constexpr (kFed) {
        exchange.channels[channel] =
            make_float4(grids[x].mid, grids[x].inverse, scale / kCodeStep<kBits>, 0.0f);
      }
    }
    if constexpr (!kFed) {
      exchange.grids[g][line] =
          make_float4(grids[0].mid, grids[0].inverse, grids[1].mid, grids[1].inverse);
    }
  }
}

// weights: of the tile's KV head; null: no feedback (known when compiled).
template <int kHeadDim, int kBits, bool kFed>
__device__ inline void key_tile(Rotated<kHeadDim>& y, TileLane place, const TileLayout& layout,
                                const FeedbackWeights<kHeadDim>* weights,
                                KeyExchange<kHeadDim>& exchange, std::uint8_t* out) {
  static_assert(kHeadDim % 32 == 0);  // four lanes load a row, 8 numbers a piece
  const int norm = scale_keys<kHeadDim>(y, place);
  publish_extremes<kHeadDim>(y, place, exchange);
  place.sync();
  key_grids<kHeadDim, kBits, kFed>(norm, place, exchange, layout, out);
  if constexpr (kFed) {
    pack_keys_fed<kHeadDim, kBits>(y, place, *weights, exchange.channels, exchange.line,
                                   out + layout.k_codes_offset());
    return;
  }
  place.sync();
  Grid grids[kHeadDim / 16][2];
#pragma unroll
  for (int line = 0; line < kHeadDim / 16; ++line) {
    const float4 both = exchange.grids[place.g()][line];
    grids[line][0] = {both.x, both.y};
    grids[line][1] = {both.z, both.w};
  }
  if constexpr (kBits == 2) {
    pack_keys_2<kHeadDim>(y, place, grids, out + layout.k_codes_offset());
  } else {
    pack_keys_4<kHeadDim>(y, place, grids, out + layout.k_codes_offset());
  }
}

template <int kHeadDim, int kBits>
__device__ inline void value_tile(const Rotated<kHeadDim>& y, TileLane place,
                                  const TileLayout& layout, std::uint8_t* out) {
  float lows[4];
  float highs[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    lows[b] = highs[b] = at<kHeadDim>(y, 0, 0, 0, b);
#pragma unroll
    for (int i = 1; i < kHeadDim / 8; ++i) {
      const float value = at<kHeadDim>(y, i % 2, i / 2 % 2, i / 4, b);
      lows[b] = fminf(lows[b], value);
      highs[b] = fmaxf(highs[b], value);
    }
#pragma unroll
    for (int distance = 4; distance < kWarp; distance *= 2) {
      lows[b] = fminf(lows[b], __shfl_xor_sync(kAllLanes, lows[b], distance));
      highs[b] = fmaxf(highs[b], __shfl_xor_sync(kAllLanes, highs[b], distance));
    }
  }
  Grid mine;
  const ValueParams params =
      value_params<kBits>(own_of(lows, place.lane), own_of(highs, place.lane), &mine);
  if (place.g() < 4) {
    const int position = 4 * place.quad() + place.g();
    out[layout.v_scales_offset() + position] = static_cast<std::uint8_t>(params.scale);
    out[layout.v_mids_offset() + position] = static_cast<std::uint8_t>(params.mid);
  }
  mine.inverse *= kCodeStep<kBits>;
  Grid grids[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    grids[b] = {of_token(mine.mid, place.lane, b), of_token(mine.inverse, place.lane, b)};
  }
  pack_values<kHeadDim, kBits>(y, place, grids, out + layout.v_codes_offset());
}

}  // namespace oscar::cuda
