// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// feedback: the rounding error of a K channel moves on to the channels behind it (docs/format.md),
// for tiles that two warps hold in registers (rotate.cuh). A line of 16 channels at a time: one
// warp rounds it channel by channel, a lane a position; then both warps add the line's errors to
// the later lines in their registers. Every value gets its terms in the order of the channels.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/pack.cuh"
#include "cuda/quantize.cuh"
#include "cuda/rotate.cuh"

namespace oscar::cuda {

inline constexpr int kLineChannels = 16;

// The weights of one KV head, for all tiles of a block.
template <int kHeadDim>
struct FeedbackWeights {
  static constexpr int kQuads = kHeadDim / 64;  // of lines

  // [c][word]: fp16 pairs (c', c' + 4), as the lanes hold channels. The lines of a lane g are in
  // 16-byte quads, whose order depends on g: the eight lanes of a load take all 32 banks.
  std::uint32_t later[kHeadDim][kHeadDim / 2];
  float within[kHeadDim][kLineChannels];  // [c][k]: for channel k of c's own line

  [[nodiscard]] static __device__ int quad_word(int g, int quad) {
    return (g * kQuads + (quad ^ g * kQuads / 8)) * 4;
  }
};

// From feedback [head_dim][head_dim], by all threads of a block. Nothing below the diagonal is
// used.
template <int kHeadDim>
__device__ inline void load_weights(const std::uint16_t* feedback,
                                    FeedbackWeights<kHeadDim>& weights) {
  constexpr int kChunks = kHeadDim / 8;  // of a row
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kHeadDim * kChunks;
       i += static_cast<int>(blockDim.x)) {
    const int c = i / kChunks;
    const int chunk = i % kChunks;
    const int line = chunk / 2;
    if (line < c / kLineChannels) continue;
    const uint4 raw = reinterpret_cast<const uint4*>(feedback)[i];
    const std::uint32_t pairs[4] = {
        __byte_perm(raw.x, raw.z, 0x5410), __byte_perm(raw.x, raw.z, 0x7632),
        __byte_perm(raw.y, raw.w, 0x5410), __byte_perm(raw.y, raw.w, 0x7632)};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int g = k + 4 * (chunk % 2);
      weights.later[c][weights.quad_word(g, line / 4) + line % 4] = pairs[k];
      if (line > c / kLineChannels) continue;
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pairs[k]));
      weights.within[c][8 * (chunk % 2) + k] = both.x;
      weights.within[c][8 * (chunk % 2) + k + 4] = both.y;
    }
  }
}

// A line of a tile on its way through rounding, [channel][position].
struct FeedbackLine {
  float columns[kLineChannels][kTileTokens];
  float errors[kLineChannels][kTileTokens];  // negative: what is added to later channels
};

template <int kHeadDim>
__device__ inline void publish_line(const Rotated<kHeadDim>& z, TileLane place, int line,
                                    FeedbackLine& shared) {
  const int channel = place.g() % 4 + 8 * (place.g() / 4);
#pragma unroll
  for (int l = 0; l < kHeadDim / kLineChannels; ++l) {
    if (l != line) continue;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const auto of = [&](int b) { return at<kHeadDim>(z, x, l % 2, l / 2, b); };
      *reinterpret_cast<float4*>(&shared.columns[channel + 4 * x][4 * place.quad()]) =
          make_float4(of(0), of(1), of(2), of(3));
    }
  }
}

// Rounds a line: codes [word][position] and errors. channels: mid, inverse / 2^bits and scale
// 2^bits of each; weights: within, both from the line's first channel on.
template <int kBits>
__device__ inline void round_line(const float (*weights)[kLineChannels], const float4* channels,
                                  int position, FeedbackLine& shared, std::uint32_t* codes) {
  constexpr int kPerWord = 32 / kBits;
  float z[kLineChannels];
  std::uint32_t words[kLineChannels / kPerWord] = {};
#pragma unroll
  for (int k = 0; k < kLineChannels; ++k) z[k] = shared.columns[k][position];
#pragma unroll
  for (int k = 0; k < kLineChannels; ++k) {
    const float4 channel = channels[k];
    std::uint32_t code = 0;
    const float error = negative_error<kBits>(z[k], {channel.x, channel.y}, channel.z, &code);
    shared.errors[k][position] = error;
    words[k / kPerWord] += code << (8 * (k % 4) + kBits * (k % kPerWord / 4));
#pragma unroll
    for (int later = k + 1; later < kLineChannels; ++later) {
      z[later] = __fmaf_rn(error, weights[k][later], z[later]);
    }
  }
#pragma unroll
  for (int i = 0; i < kLineChannels / kPerWord; ++i) {
    codes[i * kTileTokens + position] = words[i] - magic_sum<kBits>();
  }
}

// Adds the errors of `line` to all lines behind it.
template <int kHeadDim>
__device__ inline void carry_line(Rotated<kHeadDim>& z, TileLane place, int line,
                                  const FeedbackWeights<kHeadDim>& weights,
                                  const FeedbackLine& shared) {
  constexpr int kStep = 4;  // channels whose errors are in registers
#pragma unroll 1
  for (int first = 0; first < kLineChannels; first += kStep) {
    float4 errors[kStep];
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      errors[k] = *reinterpret_cast<const float4*>(&shared.errors[first + k][4 * place.quad()]);
    }
#pragma unroll
    for (int quad = 0; quad < kHeadDim / 64; ++quad) {
      if (4 * quad + 3 <= line) continue;
      uint4 pairs[kStep];
#pragma unroll
      for (int k = 0; k < kStep; ++k) {
        pairs[k] = *reinterpret_cast<const uint4*>(
            &weights.later[kLineChannels * line + first + k][weights.quad_word(place.g(), quad)]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int l = 4 * quad + i;
        if (l <= line) continue;
#pragma unroll
        for (int k = 0; k < kStep; ++k) {
          const std::uint32_t pair = (&pairs[k].x)[i];
          const float2 weight = __half22float2(*reinterpret_cast<const __half2*>(&pair));
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            const float error = (&errors[k].x)[b];
            float& low = at<kHeadDim>(z, 0, l % 2, l / 2, b);
            float& high = at<kHeadDim>(z, 1, l % 2, l / 2, b);
            low = __fmaf_rn(error, weight.x, low);
            high = __fmaf_rn(error, weight.y, high);
          }
        }
      }
    }
  }
}

// Codes of a tile, by its two warps, which take turns at rounding. z and channels are those of the
// stored parameters; `shared` and `channels` may be used again when it returns.
template <int kHeadDim, int kBits>
__device__ inline void pack_keys_fed(Rotated<kHeadDim>& z, TileLane place,
                                     const FeedbackWeights<kHeadDim>& weights,
                                     const float4* channels, FeedbackLine& shared,
                                     std::uint8_t* codes) {
  constexpr int kLines = kHeadDim / kLineChannels;
  constexpr int kLineWords = kTileTokens * kLineChannels * kBits / 32;
  publish_line<kHeadDim>(z, place, 0, shared);
#pragma unroll 1
  for (int line = 0; line < kLines; ++line) {
    place.sync();
    const int channel = kLineChannels * line;
    if (place.warp == line % 2) {
      round_line<kBits>(weights.within + channel, channels + channel, place.lane, shared,
                        reinterpret_cast<std::uint32_t*>(codes) + line * kLineWords);
    }
    place.sync();
    if (line + 1 == kLines) break;
    carry_line<kHeadDim>(z, place, line, weights, shared);
    publish_line<kHeadDim>(z, place, line + 1, shared);
  }
}

}  // namespace oscar::cuda
