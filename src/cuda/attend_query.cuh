// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The query of a segment: balance, sign and Hadamard, then fp16 pairs in MMA order.
//
// Channel pair (quad, e) of a lane holds channels 4 quad + e and 4 quad + e + 2, as the codes of a
// K word come out of a mask. The code of bit group i = quad % kLineQuads is a subnormal
// code 2^(kKBits i - 24): its factor 2^(-kKBits i) is in the query.
//
// Lane 4 g + c rotates the channels from c kLaneChannels on of MMA column g. Where only even
// columns have a query, lanes g and g + 1 take half of these channels each.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/attend_shape.cuh"
#include "cuda/mma.cuh"
#include "cuda/page.cuh"

namespace oscar::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// Bit c % 32: channel_sign of channel 32 word + c is negative.
constexpr std::uint32_t sign_bits(int word) {
  std::uint32_t bits = 0;
  for (int c = 0; c < 32; ++c) {
    if (channel_sign(32 * word + c) < 0.0f) bits |= 1u << c;
  }
  return bits;
}
// From immediates: a miss of the constant cache would wait behind all the tiles under way.
template <int kCount, int kWord = 0>
__device__ inline std::uint32_t sign_word(int word) {
  constexpr std::uint32_t kBits = sign_bits(kWord);
  if constexpr (kWord + 1 < kCount)
    return word == kWord ? kBits : sign_word<kCount, kWord + 1>(word);
  return kBits;
}

__device__ inline float flip_sign(float x, std::uint32_t bits, int bit) {
  return __uint_as_float(__float_as_uint(x) ^ (bits >> bit & 1u) << 31);
}

template <class S>
struct DecodeQuery {
  std::uint32_t pairs[S::kBlocks][S::kPairs];
};

// What a lane rotates.
template <class S>
struct QueryPart {
  static constexpr int kChannels = S::kSparse ? S::kLaneChannels / 2 : S::kLaneChannels;
  static constexpr int kPairs = kChannels / 2;

  __device__ static int column(const Lane& lane, int block) {
    return S::kSparse ? lane.g / 2 : 8 * block + lane.g;
  }
  __device__ static int first_channel(const Lane& lane) {
    return lane.c * S::kLaneChannels + (S::kSparse ? lane.g % 2 * kChannels : 0);
  }
};

// Hadamard transform, but for its norm, over blocks of `block` channels that lanes share.
template <class S>
__device__ inline void hadamard(int block, const Lane& lane, float (&x)[QueryPart<S>::kChannels]) {
  constexpr int kOwn = QueryPart<S>::kChannels;
#pragma unroll
  for (int distance = 1; distance < kOwn; distance *= 2) {
    if (distance >= block) continue;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if ((i & distance) != 0) continue;
      const float a = x[i];
      const float b = x[i + distance];
      x[i] = a + b;
      x[i + distance] = a - b;
    }
  }
#pragma unroll
  for (int distance = kOwn; distance < S::kPad; distance *= 2) {
    if (distance >= block) continue;
    const int step = distance < S::kLaneChannels ? 4 : distance / S::kLaneChannels;
    const float sign = (lane.index & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (float& value : x) {
      value = fmaf(sign, value, __shfl_xor_sync(kFullWarp, value, step));
    }
  }
}

// The query's bytes, asked for before the tiles, which would be in their way for microseconds. Of
// an fp32 query only the first half, and the rest when it is used.
template <class S>
struct RawQuery {
  uint4 chunks[S::kBlocks][QueryPart<S>::kChannels / kChunk];
};

template <class S>
__device__ inline RawQuery<S> load_raw_query(const CudaAttendCall& call, const DecodePlan& plan,
                                             const DecodeItem& item, const Lane& lane) {
  using Part = QueryPart<S>;
  RawQuery<S> raw;
  const int bytes = bytes_of(call.q.dtype);
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
    const DecodeColumn at = column_of(plan, item, Part::column(lane, n));
    const std::byte* row = row_address(call.q, item.sequence.first_row + at.query, at.q_head);
#pragma unroll
    for (int i = 0; i < Part::kChannels / kChunk; ++i) {
      const int channel = Part::first_channel(lane) + kChunk * i;
      raw.chunks[n][i] = uint4{};
      if (at.used && (S::kWhole || channel < S::head_dim(call))) {
        raw.chunks[n][i] = *reinterpret_cast<const uint4*>(row + channel * bytes);
      }
    }
  }
  return raw;
}

template <class S>
__device__ inline void load_rotated(const CudaAttendCall& call, const DecodePlan& plan,
                                    const DecodeItem& item, const Lane& lane, int block,
                                    const uint4 (&raw)[QueryPart<S>::kChannels / kChunk],
                                    float (&x)[QueryPart<S>::kChannels]) {
  using Part = QueryPart<S>;
  const int dim = S::head_dim(call);
  const int first = Part::first_channel(lane);
  const auto word = [&](int i) {
    const uint4& four = raw[i / 4];
    return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
  };
  if (call.q.dtype == DType::kBF16) {
#pragma unroll
    for (int i = 0; i < Part::kPairs; ++i) {
      x[2 * i] = __uint_as_float(word(i) << 16);
      x[2 * i + 1] = __uint_as_float(word(i) & 0xffff0000u);
    }
  } else if (call.q.dtype == DType::kF16) {
#pragma unroll
    for (int i = 0; i < Part::kPairs; ++i) {
      const std::uint32_t bits = word(i);
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(bits));
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  } else {
    const DecodeColumn at = column_of(plan, item, Part::column(lane, block));
    const std::byte* row = row_address(call.q, item.sequence.first_row + at.query, at.q_head);
#pragma unroll
    for (int i = 0; i < Part::kChannels; i += kChunk) {
      float4 four{};
      if (at.used && (S::kWhole || first + i < dim)) {
        four = *reinterpret_cast<const float4*>(row + 4 * (first + i + 4));
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) x[i + k] = __uint_as_float(word(i / 2 + k));
      x[i + 4] = four.x;
      x[i + 5] = four.y;
      x[i + 6] = four.z;
      x[i + 7] = four.w;
    }
  }
  if (call.cache.balance != nullptr) {
    const float* balance = call.cache.balance + item.kv_head * dim + first;
#pragma unroll
    for (int i = 0; i < Part::kChannels; ++i) {
      if (S::kWhole || first + i < dim) x[i] *= balance[i];
    }
  }
#pragma unroll
  for (int word = 0; word < Part::kChannels; word += 32) {
    const std::uint32_t bits = sign_word<S::kPad / 32>((first + word) / 32) >> first % 32;
#pragma unroll
    for (int i = word; i < min(word + 32, Part::kChannels); ++i)
      x[i] = flip_sign(x[i], bits, i - word);
  }
  hadamard<S>(hadamard_block(dim), lane, x);
}

// After a common power of two, the largest |q| is 2 to 4; 2^13 of it fit fp16. A scale is
// steps 2^-4, the bits of its index and kStepBits, so that a product is at most 6 4 2^9; a mid
// index is a subnormal 2^-20 (bits 4 to 9).
inline constexpr float kQueryUnit = 0x1p13f;
inline constexpr float kStepUnit = 0x1p-4f;
inline constexpr std::uint32_t kStepBits = 0x30003000u;  // key_scale_steps(0) kStepUnit, twice
inline constexpr float kMidUnit = 0x1p-20f;
inline constexpr int kScoreExponent = 24 - 13 + 4;  // code 2^-24, query 2^13, scale 2^-4

// fp16 pairs of the channels of this lane, times `unit`; returns the sum of what they stand for.
template <class S>
__device__ inline float round_query(const Lane& lane, float unit,
                                    const float (&x)[QueryPart<S>::kChannels],
                                    std::uint32_t (&pairs)[QueryPart<S>::kPairs]) {
  // The second half of a line has the higher bit groups.
  constexpr int kOwnQuads = QueryPart<S>::kChannels / 4;
  constexpr int kLater = kOwnQuads % S::kLineQuads;
  const bool later = kLater > 0 && lane.g % 2 != 0;
  const float own = later ? 1.0f / static_cast<float>(1 << S::kKBits * kLater) : 1.0f;
  float sum = 0.0f;
#pragma unroll
  for (int pair = 0; pair < QueryPart<S>::kPairs; ++pair) {
    const int channel = pair / 2 * 4 + pair % 2;
    const int group = pair / 2 % S::kLineQuads;
    const float fold = 1.0f / static_cast<float>(1 << S::kKBits * group);
    const float factor = unit * own * fold;
    const __half2 rounded = __floats2half2_rn(x[channel] * factor, x[channel + 2] * factor);
    pairs[pair] = reinterpret_cast<const std::uint32_t&>(rounded);
    const float2 back = __half22float2(rounded);
    sum += (back.x + back.y) / fold;
  }
  return sum / own;
}

// The halves that lanes g and g + 1 have made together: of an even column, and zeros beside it.
template <class S>
__device__ inline void take_halves(const Lane& lane,
                                   const std::uint32_t (&own)[QueryPart<S>::kPairs],
                                   std::uint32_t (&pairs)[S::kPairs]) {
  const bool used = lane.g % 2 == 0;
#pragma unroll
  for (int i = 0; i < QueryPart<S>::kPairs; ++i) {
    const std::uint32_t other = __shfl_xor_sync(kFullWarp, own[i], 4);
    pairs[i] = used ? own[i] : 0;
    pairs[i + S::kPairs / 2] = used ? other : 0;
  }
}

// Asks for the center's channels, to where the tiles will be unpacked.
template <class S>
__device__ inline void ask_center(const CudaAttendCall& call, const DecodeItem& item,
                                  const Lane& lane, const char* warp) {
  static_assert(4 * S::kPad <= S::kBounds);
  const int dim = S::head_dim(call);
  const float* center = call.cache.center + item.kv_head * dim;
#pragma unroll
  for (int first = 0; first < S::kPad; first += 4 * 32) {
    const int channel = first + 4 * lane.index;
    if (S::kPad % 128 != 0 && channel >= S::kPad) continue;
    const bool exists = S::kWhole || channel < dim;
    cp_async_16_or_zero(shared_address(warp) + 4 * channel, center + (exists ? channel : 0),
                        exists);
  }
}

// query . center of each column, times `factor`. ask_center's copies are all but the last group.
template <class S>
__device__ inline void multiply_center(const Lane& lane, const char* warp, float factor,
                                       const float (&x)[S::kBlocks][QueryPart<S>::kChannels],
                                       float (&products)[S::kBlocks]) {
  cp_async_wait<1>();
  __syncwarp();
  const float* center = reinterpret_cast<const float*>(warp) + QueryPart<S>::first_channel(lane);
#pragma unroll
  for (int i = 0; i < QueryPart<S>::kChannels; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(center + i);
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) {
      products[n] = fmaf(x[n][i], four.x, products[n]);
      products[n] = fmaf(x[n][i + 1], four.y, products[n]);
      products[n] = fmaf(x[n][i + 2], four.z, products[n]);
      products[n] = fmaf(x[n][i + 3], four.w, products[n]);
    }
  }
#pragma unroll
  for (float& product : products) {
#pragma unroll
    for (int step = 1; step < (S::kSparse ? 8 : 4); step *= 2) {
      product += __shfl_xor_sync(kFullWarp, product, step);
    }
    product *= factor;
  }
}

template <class S>
__device__ inline void load_query(const CudaAttendCall& call, const DecodePlan& plan,
                                  const Lane& lane, const RawQuery<S>& raw, const char* warp,
                                  WarpState<S>& state, DecodeQuery<S>& query) {
  float x[S::kBlocks][QueryPart<S>::kChannels];
  float largest = 0.0f;
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
    load_rotated<S>(call, plan, state.item, lane, n, raw.chunks[n], x[n]);
#pragma unroll
    for (const float value : x[n]) largest = fmaxf(largest, fabsf(value));
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
  }
  const float factor =
      call.options.scale * kLog2E * rsqrtf(static_cast<float>(hadamard_block(S::head_dim(call))));
  float center[S::kBlocks] = {};
  if (call.cache.center != nullptr) multiply_center<S>(lane, warp, factor, x, center);
  // Exponent of the largest |q| that the loops below see; 0 where all are 0.
  const float scaled = fmaxf(largest * fabsf(factor), 0x1p-100f);
  const int exponent = static_cast<int>(__float_as_uint(scaled) >> 23) - 127;
  const float unit = factor * kQueryUnit * exp2f(static_cast<float>(1 - exponent));
  if (lane.index == 0) state.log_unit = static_cast<float>(kScoreExponent - 1 + exponent);
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
    std::uint32_t pairs[QueryPart<S>::kPairs];
    float sum = round_query<S>(lane, unit, x[n], pairs);
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    if constexpr (S::kSparse) {
      sum += __shfl_xor_sync(kFullWarp, sum, 4);
      take_halves<S>(lane, pairs, query.pairs[n]);
      if (lane.g % 2 != 0) sum = 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < S::kPairs; ++i) query.pairs[n][i] = pairs[i];
    }
    if (lane.c == 0) {
      state.sums[8 * n + lane.g] = sum * (static_cast<float>(kMaxMidIndex) * kMidUnit);
      state.center[QueryPart<S>::column(lane, n)] = center[n];
    }
  }
}

}  // namespace oscar::cuda
