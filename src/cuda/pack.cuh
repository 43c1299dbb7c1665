// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Codes of a warp's 16 tokens (rotate.cuh has their order) into the 32-bit words of format.hpp.
// Lane (g, q) of warp w of the tile holds tokens Q + 8 b, b = 0..3, of the quad Q = 4 w + q, which
// are positions 4 Q + b.
#pragma once

#include <cstdint>

#include "cuda/page.cuh"
#include "cuda/quantize.cuh"
#include "cuda/rotate.cuh"

namespace oscar::cuda {

inline constexpr int kTileThreads = 2 * kWarp;

// Barrier `barrier` of `threads` threads of a block. compute-sanitizer's racecheck does not follow
// bar.arrive: with OSCAR_RACECHECK both sides wait.
__device__ inline void arrive_at(int barrier, int threads) {
#ifdef OSCAR_RACECHECK
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}
__device__ inline void wait_at(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Place of a lane in its tile.
struct TileLane {
  int lane;
  int warp;       // of the tile
  int tile;       // of the block
  int block = 0;  // of eight tokens, the first of this warp

  [[nodiscard]] __device__ int thread() const { return kWarp * warp + lane; }
  // A barrier of the tile's two warps; the whole block's is number 0.
  __device__ void sync() const { wait_at(tile + 1, kTileThreads); }

  [[nodiscard]] __device__ int g() const { return lane / 4; }
  [[nodiscard]] __device__ int q() const { return lane % 4; }
  [[nodiscard]] __device__ int quad() const { return 4 * warp + q(); }
  // The token whose row this lane loads for block t of eight: column g of it, which becomes token
  // b = 2 t + g % 2 of the lanes q = g / 2.
  [[nodiscard]] __device__ int loaded_token(int t) const {
    return 4 * warp + g() / 2 + 8 * (2 * (t + block) + g() % 2);
  }
};

// Byte p of the lanes g % 4 = b becomes byte b of the lanes g % 4 = p.
__device__ inline std::uint32_t transpose_bytes(std::uint32_t word, int lane) {
  const std::uint32_t pairs =
      __byte_perm(word, __shfl_xor_sync(kAllLanes, word, 8), (lane & 8) == 0 ? 0x5410 : 0x3276);
  return __byte_perm(pairs, __shfl_xor_sync(kAllLanes, pairs, 4),
                     (lane & 4) == 0 ? 0x6240 : 0x3715);
}

// The high nibbles of the lanes g / 4 = 0 change places with the low nibbles of their partners.
__device__ inline std::uint32_t transpose_nibbles(std::uint32_t word, int lane) {
  const bool upper = (lane & 16) != 0;
  const std::uint32_t kept = upper ? 0xf0f0f0f0u : 0x0f0f0f0fu;
  const std::uint32_t other = __shfl_xor_sync(kAllLanes, word, 16);
  return (word & kept) | (__funnelshift_r(other, other, upper ? 4 : 28) & ~kept);
}

// What the magic numbers of code_bits at shifts 0, kBits, 2 kBits, ... add up to.
template <int kBits>
constexpr std::uint32_t magic_sum() {
  std::uint32_t sum = 0;
  for (int shift = 0; shift < 32; shift += kBits) sum += kCodeMagicBits<kBits> << shift;
  return sum;
}

// K. grids[line][x]: of channel g % 4 + 4 x + 8 (g / 4) + 16 line, with inverse / 2^bits.
//
// 2 bits: the two codes of a lane and line are a nibble of the line's word. A register collects the
// nibbles of eight lines of a token (head_dim 64: four lines of two tokens); transposed over the
// eight lanes g it is one word.
template <int kHeadDim>
__device__ inline void pack_keys_2(const Rotated<kHeadDim>& z, TileLane place,
                                   const Grid (&grids)[kHeadDim / 16][2], std::uint8_t* codes) {
  constexpr bool kTwoTokens = kHeadDim == 64;
  constexpr int kBlocks = kTwoTokens ? 1 : kHeadDim / 128;  // of eight lines
  constexpr int kRegisters = kTwoTokens ? 2 : 4;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    std::uint32_t words[kRegisters] = {};
#pragma unroll
    for (int i = 0; i < 16 * kRegisters; ++i) {
      const int x = i % 2;
      const int nibble = i / 2 % 8;
      const int line = kTwoTokens ? nibble % 4 : 8 * block + nibble;
      const int b = kTwoTokens ? i / 16 + 2 * (nibble / 4) : i / 16;
      words[i / 16] += code_bits<2>(at<kHeadDim>(z, x, line % 2, line / 2, b), grids[line][x])
                       << (8 * (nibble % 4) + 4 * (nibble / 4) + 2 * x);
    }
#pragma unroll
    for (std::uint32_t& word : words) {
      word = transpose_bytes(transpose_nibbles(word - magic_sum<2>(), place.lane), place.lane);
    }
    const int line = kTwoTokens ? place.g() % 4 : 8 * block + place.g();
    std::uint8_t* to = codes + 4 * (line * kTileTokens + 4 * place.quad());
    if constexpr (kTwoTokens) {
      *reinterpret_cast<uint2*>(to + 8 * (place.g() / 4)) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// 4 bits: the two codes are a byte of the word of the eight channels 2 line + g / 4.
template <int kHeadDim>
__device__ inline void pack_keys_4(const Rotated<kHeadDim>& z, TileLane place,
                                   const Grid (&grids)[kHeadDim / 16][2], std::uint8_t* codes) {
#pragma unroll
  for (int block = 0; block < kHeadDim / 64; ++block) {
    std::uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int x = i % 2;
      const int b = i / 8;
      const int line = 4 * block + i / 2 % 4;
      words[b] += code_bits<4>(at<kHeadDim>(z, x, line % 2, line / 2, b), grids[line][x])
                  << (8 * (line % 4) + 4 * x);
    }
#pragma unroll
    for (std::uint32_t& word : words) {
      word = transpose_bytes(word - magic_sum<4>(), place.lane);
    }
    const int eight = 2 * (4 * block + place.g() % 4) + place.g() / 4;
    *reinterpret_cast<uint4*>(codes + 4 * (eight * kTileTokens + 4 * place.quad())) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// V: whether neighbouring channels are in one lane (rotate.cuh). Where the groups of a word are
// only 16 channels, bit 4 of the channel has to be in the lane instead.
template <int kHeadDim, int kBits>
inline constexpr bool kValuePairs = kHeadDim * kBits > 128;

// V. All codes of a word are in one lane.
template <int kHeadDim, int kBits>
__device__ inline void pack_values(const Rotated<kHeadDim>& y, TileLane place,
                                   const Grid (&grids)[4], std::uint8_t* codes) {
  constexpr int kGroups = 8 / kBits;
  constexpr bool kPairs = kValuePairs<kHeadDim, kBits>;
  constexpr int kRuns = kPairs ? kHeadDim / 32 / kGroups : 1;  // channels 32 run + ... of a group
  std::uint32_t words[kRuns][2][2] = {};                       // [run][x][m]; not kPairs: m = 0
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) {
    const int b = i % 4;
    const int m = i / 4 % 2;
    const int x = i / 8 % 2;
    const int r = i / 16;
    const int group = kPairs ? r / kRuns : m + 2 * r;
    words[kPairs ? r % kRuns : 0][x][kPairs ? m : 0] +=
        code_bits<kBits>(at<kHeadDim>(y, x, m, r, b), grids[b]) << (8 * b + kBits * group);
  }
  std::uint8_t* row = codes + 4 * place.quad() * (kHeadDim / kGroups);
#pragma unroll
  for (int i = 0; i < 2 * kRuns; ++i) {
    const int x = i % 2;
    const std::uint32_t* pair = words[i / 2][x];
    if constexpr (kPairs) {
      const int channel = 2 * (place.g() % 2) + 4 * x + 8 * (place.g() / 2) + 32 * (i / 2);
      *reinterpret_cast<uint2*>(row + 4 * channel) =
          make_uint2(pair[0] - magic_sum<kBits>(), pair[1] - magic_sum<kBits>());
    } else {
      const int channel = place.g() % 4 + 4 * x + 8 * (place.g() / 4);
      *reinterpret_cast<std::uint32_t*>(row + 4 * channel) = pair[0] - magic_sum<kBits>();
    }
  }
}

}  // namespace oscar::cuda
