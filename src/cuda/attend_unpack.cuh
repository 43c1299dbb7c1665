// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// What four tiles need besides their codes, once for the group: K scales as fp16 in the order of
// the query, K norms, V scales, V mids, and what K's mids and the middle of the codes add to every
// score of a tile.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/attend_query.cuh"
#include "cuda/attend_shape.cuh"
#include "cuda/mma.cuh"

namespace oscar::cuda {

template <class S>
__device__ inline const std::uint8_t* tail_of(const CudaAttendCall&, const char* warp, int tile) {
  return reinterpret_cast<const std::uint8_t*>(warp) + S::kTails + tile * S::kTailBytes;
}

// The norm bytes of four positions: lane l has position group l % 8 of tile l / 8.
template <class S>
__device__ inline std::uint32_t norm_word(const CudaAttendCall& call, const Lane& lane,
                                          const char* warp) {
  const std::uint8_t* norms = tail_of<S>(call, warp, lane.index / 8) + S::head_dim(call) + 64;
  return reinterpret_cast<const std::uint32_t*>(norms)[lane.index % 8];
}

// The units of tile l / 8 in lane l: the product puts the top bits of a word's bytes side by side
// at its top, and the tile's eight lanes put theirs together.
__device__ inline std::uint32_t units_word(std::uint32_t norms, const Lane& lane) {
  std::uint32_t bits = (norms & 0x80808080u) * 0x00204081u >> 28 << 4 * (lane.index % 8);
  bits |= __shfl_xor_sync(kFullWarp, bits, 1);
  bits |= __shfl_xor_sync(kFullWarp, bits, 2);
  return bits | __shfl_xor_sync(kFullWarp, bits, 4);
}

struct KeyUnits {
  float scale;  // U_s, never 0
  float mid;    // U_m
};
__device__ inline KeyUnits key_units(std::uint32_t bits) {
  const float scale = __uint_as_float(bits << 16) * (1.0f / kMaxScaleSteps);
  const float mid = __uint_as_float(bits & 0xffff0000u) * (1.0f / kMaxMidIndex);
  // Where all scales are 0, mid / scale stays so small that sums of it are finite.
  return {fmaxf(fmaxf(scale, mid * 0x1p-40f), 0x1p-100f), mid};
}

// Lane 4 g + c: tile g % 4, scales for g < 4, mid indices for the others; the parameter words of
// channels c kLaneChannels and on. An MMA with these as rows sums them over the channels. A scale
// index is the last bit of an fp16 exponent and the first one of its mantissa, a mid index with its
// bias six bits of a subnormal. units_of_lane: units_word.
template <class S>
__device__ inline void unpack_channels(const CudaAttendCall& call, const Lane& lane, char* warp,
                                       const GroupTiles& tiles, const WarpState<S>& state,
                                       const DecodeQuery<S>& query, std::uint32_t units_of_lane) {
  const int tile = lane.g % kGroupTiles;
  const bool is_mid = lane.g >= kGroupTiles;
  const int left = is_mid ? 4 : 3;
  const int right = is_mid ? 4 : 5;
  const std::uint32_t mask = is_mid ? 0x03f003f0u : 0x06000600u;
  const std::uint32_t exponent = is_mid ? 0 : kStepBits;
  const std::uint8_t* tail = tail_of<S>(call, warp, tile);
  const auto* words = reinterpret_cast<const uint4*>(tail + lane.c * S::kLaneChannels);
  auto* scales = reinterpret_cast<uint4*>(warp + S::kScales + tile * S::kTileBytes);
  // Used as operands directly, the pairs would stand in aligned register pairs, and every product
  // in the loop would first move its factor out of one.
  const std::uint32_t one = state.one;
  // Two quads share an operand, one in rows g, the other in rows g + 8.
  float sums[S::kBlocks][S::kLineQuads][4] = {};
#pragma unroll
  for (int i = 0; i < S::kQuads / 4; ++i) {
    const uint4 four = words[i];
    const std::uint32_t w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const std::uint32_t a[4] = {
          (w[j] << left & mask) | exponent, (w[j + 1] << left & mask) | exponent,
          (w[j] >> right & mask) | exponent, (w[j + 1] >> right & mask) | exponent};
      if (!is_mid) scales[(4 * i + j) / 2 * 4 + lane.c] = make_uint4(a[0], a[1], a[2], a[3]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int quad = 4 * i + j + k;
#pragma unroll
        for (int n = 0; n < S::kBlocks; ++n) {
          float (&sum)[4] = sums[n][quad % S::kLineQuads];
          mma_f16(sum, a[0], a[1], a[2], a[3], multiply_f16x2(query.pairs[n][2 * quad], one),
                  multiply_f16x2(query.pairs[n][2 * quad + 1], one), sum);
        }
      }
    }
  }
  const KeyUnits units = key_units(__shfl_sync(kFullWarp, units_of_lane, 8 * tile));
  const float ratio = __fdividef(units.mid * (kStepUnit / kMidUnit), units.scale);
  constexpr float kMiddle = 0.5f * static_cast<float>(max_code(S::kKBits));
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
    float offset[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < S::kLineQuads; ++i) {
        sum = fmaf(static_cast<float>(1 << S::kKBits * i), sums[n][i][2 * (i % 2) + j], sum);
      }
      const float mids = __shfl_down_sync(kFullWarp, sum, 16) - state.sums[8 * n + 2 * lane.c + j];
      offset[j] = 0x1p-24f * (ratio * mids - kMiddle * sum);
      if (!tiles.has(tile)) offset[j] = 0.0f;  // of anything, perhaps NaN
    }
    auto* offsets = reinterpret_cast<float4*>(warp + S::kOffsets + tile * S::kTileBytes);
    if (!is_mid) {
      offsets[4 * n + lane.c] = make_float4(offset[0], offset[1], offset[0], offset[1]);
    }
  }
}

// Lane l: tile l / 8, the four tokens of position group l % 8. A token that is not seen gets an
// exponent of -infinity.
template <class S>
__device__ inline void unpack_tokens(const CudaAttendCall& call, const Lane& lane, char* warp,
                                     const GroupTiles& tiles, float log_unit,
                                     std::uint32_t units_of_lane) {
  const int dim = S::head_dim(call);
  const int tile = lane.index / 8;
  const int at = lane.index % 8;
  const std::uint8_t* tail = tail_of<S>(call, warp, tile);
  const auto word = [&](int offset) {
    return *reinterpret_cast<const std::uint32_t*>(tail + offset + 4 * at);
  };
  const std::uint32_t scale = word(dim);
  const std::uint32_t norm = norm_word<S>(call, lane, warp);
  const float unit = log2_fast(key_units(units_of_lane).scale) + log_unit - kNormBias;
  float norms[4], logs[4], inverses[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t u = norm >> 8 * i & kMaxNormIndex;
    const std::uint32_t v = scale >> 8 * i & 0xffu;
    norms[i] = u == 0 ? 0.0f : exp2_fast(fmaf(static_cast<float>(u), 0.125f, unit));
    // Scale 0: a weight so small that only the denominator sees it.
    logs[i] = v == 0 ? -60.0f : fmaf(static_cast<float>(v), 0.125f, -kVScaleBias);
    inverses[i] = exp2_fast(-logs[i]);
    const int token = kTileTokens * (kGroupTiles * tiles.group + tile) + at + 8 * i;
    if (token < tiles.tokens.x || token >= tiles.tokens.y) {
      norms[i] = 0.0f;
      logs[i] = -INFINITY;
    }
  }
  const auto store = [&](int offset, const float (&x)[4]) {
    reinterpret_cast<float4*>(warp + offset + tile * S::kTileBytes)[at] =
        make_float4(x[0], x[1], x[2], x[3]);
  };
  store(S::kNorms, norms);
  store(S::kLogScales, logs);
  store(S::kInverseScales, inverses);
  reinterpret_cast<std::uint32_t*>(warp + S::kMids + tile * S::kTileBytes)[at] = word(dim + 32);
}

}  // namespace oscar::cuda
