// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The codes of a group of four tiles on the tensor cores, as they are:
//   scores[token, column] = K codes (A, fp16 subnormals) x query times scales (B)
//   out[channel, column]  = V codes (A, bytes) x weights as 16-bit integers (B, two bytes each)
// One LOP3 gives a register of two K codes or of four V codes. The weights of a group are relative
// to its own maximum, so that their integers lose nothing that counts; the integer sums of a group
// are added to running ones in fp32.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/attend_query.cuh"
#include "cuda/attend_unpack.cuh"
#include "cuda/softmax.cuh"

namespace oscar::cuda {

// Sums over a segment, relative to 2^max. The byte of a V word that starts at bit group i is
// code i + 2^bits code (i + 1) + ..: what an unmasked or half masked word sums. `out` has these;
// their differences are the sums of codes.
template <class S>
struct PackedSums {
  float out[S::kLaneColumns][S::kRowBlocks][2];  // rows g and g + 8
  float mid[S::kLaneColumns];                    // sum of weight (mid / 64 - middle code)

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < S::kLaneColumns; ++j) {
      mid[j] = 0.0f;
#pragma unroll
      for (int r = 0; r < S::kRowBlocks; ++r) out[j][r][0] = out[j][r][1] = 0.0f;
    }
  }
};

template <int kBits>
__device__ constexpr std::uint32_t code_mask(int group) {
  return (kBits == 2 ? 0x00030003u : 0x000f000fu) << kBits * group;
}

// scores[block][half]: tokens g + 16 half (first two) and g + 16 half + 8, MMA columns 2 c and
// 2 c + 1. `tile`: what it was unpacked to.
template <class S>
__device__ inline void score_tile(const CudaAttendCall& call, const Lane& lane, const char* tile,
                                  const char* keys, const DecodeQuery<S>& query,
                                  float (&scores)[S::kBlocks][2][4]) {
  const auto* offsets = reinterpret_cast<const float4*>(tile + S::kOffsets + 16 * lane.c);
  const auto* scales = reinterpret_cast<const uint4*>(tile + S::kScales + 16 * lane.c);
#pragma unroll
  for (int n = 0; n < S::kBlocks; ++n) {
    const float4 offset = offsets[4 * n];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scores[n][half][0] = offset.x;
      scores[n][half][1] = offset.y;
      scores[n][half][2] = offset.z;
      scores[n][half][3] = offset.w;
    }
  }
  const int lines = S::head_dim(call) * S::kKBits / 32;
  uint4 scale{};
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) {
    int row = lane.c * S::kLines + line;
    int turn = lane.c;
    if constexpr (!S::kWhole) {
      row = min(row, lines - 1);
      turn = row / S::kLines;
    }
    const auto* words = reinterpret_cast<const uint4*>(keys + 128 * row + 16 * (lane.g ^ 2 * turn));
    const std::uint32_t low[4] = {words->x, words->y, words->z, words->w};
    const std::uint32_t high[4] = {low[0] >> 8, low[1] >> 8, low[2] >> 8, low[3] >> 8};
#pragma unroll
    for (int i = 0; i < S::kLineQuads; ++i) {
      const int quad = line * S::kLineQuads + i;
      if (quad % 2 == 0) scale = scales[quad / 2 * 4];
      constexpr auto kMask = code_mask<S::kKBits>;
      const std::uint32_t mask = kMask(i);
#pragma unroll
      for (int n = 0; n < S::kBlocks; ++n) {
        const std::uint32_t b0 =
            multiply_f16x2(quad % 2 == 0 ? scale.x : scale.y, query.pairs[n][2 * quad]);
        const std::uint32_t b1 =
            multiply_f16x2(quad % 2 == 0 ? scale.z : scale.w, query.pairs[n][2 * quad + 1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma_f16(scores[n][half], low[2 * half] & mask, low[2 * half + 1] & mask,
                  high[2 * half] & mask, high[2 * half + 1] & mask, b0, b1, scores[n][half]);
        }
      }
    }
  }
}

// V words first .. first + kCount - 1 of token quad 2 c + half.
template <class S, int kCount>
__device__ inline void load_value_words(const CudaAttendCall& call, const Lane& lane,
                                        const char* values, int half, int first,
                                        std::uint32_t (&words)[kCount]) {
  const int quad = 2 * lane.c + half;
  constexpr int kRowBytes = S::kDim * S::kVBits / 2;  // of a quad
  if constexpr (S::kWhole) {
    const bool narrow = kRowBytes == 64;  // two quads a row of 128 bytes
    const int chunk = (narrow ? 4 * half + lane.g / 2 : lane.g) ^ 2 * lane.c;
    const char* at = values + (narrow ? 128 * lane.c + 8 * (lane.g % 2) : quad * kRowBytes) +
                     128 * (first / 4) + 16 * chunk + 4 * (first % 4);
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      if constexpr (kCount % 4 == 0) {
        const uint4 four = *reinterpret_cast<const uint4*>(at + 32 * i);
        words[i] = four.x;
        words[i + 1] = four.y;
        words[i + 2] = four.z;
        words[i + 3] = four.w;
      } else if constexpr (kCount == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(at);
        words[0] = two.x;
        words[1] = two.y;
      } else {
        words[0] = *reinterpret_cast<const std::uint32_t*>(at);
      }
    }
  } else {
    const int count = S::head_dim(call) * S::kVBits / 8;
    const auto* row = reinterpret_cast<const std::uint32_t*>(values) + quad * count;
#pragma unroll
    for (int i = 0; i < kCount; ++i) words[i] = row[min(lane.g + 8 * (first + i), count - 1)];
  }
}

// Index within its channel group of V word `word` of lane group g; at least v_group_channels where
// there is none.
template <class S>
__device__ inline int value_word_index(const Lane& lane, int word) {
  if constexpr (!S::kWhole) return lane.g + 8 * word;
  if constexpr (S::kWords == 2) return 2 * lane.g + word;
  return 32 * (word / 4) + 4 * lane.g + word % 4;
}

// A V word without the codes before bit group `group`.
template <class S>
__device__ inline std::uint32_t from_group(std::uint32_t word, int group) {
  return word & (0xffu << S::kVBits * group & 0xffu) * 0x01010101u;
}

// Integer sums of `kCount` V words of one tile; weights[column]: operand B of token quads 2 c and
// 2 c + 1.
template <class S, int kCount>
__device__ inline void add_words(const CudaAttendCall& call, const Lane& lane, const char* values,
                                 int first, const std::uint32_t (&weights)[S::kLaneColumns][2],
                                 int (&sums)[S::kLaneColumns][kCount * S::kWordBlocks][4]) {
  std::uint32_t words[2][kCount];
  load_value_words<S>(call, lane, values, 0, first, words[0]);
  load_value_words<S>(call, lane, values, 1, first, words[1]);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int b = 0; b < S::kWordBlocks; ++b) {
      const std::uint32_t a0 = from_group<S>(words[0][i], 2 * b);
      const std::uint32_t a1 = from_group<S>(words[0][i], 2 * b + 1);
      const std::uint32_t a2 = from_group<S>(words[1][i], 2 * b);
      const std::uint32_t a3 = from_group<S>(words[1][i], 2 * b + 1);
#pragma unroll
      for (int j = 0; j < S::kLaneColumns; ++j) {
        mma_u8(sums[j][i * S::kWordBlocks + b], a0, a1, a2, a3, weights[j][0], weights[j][1]);
      }
    }
  }
}

// The sum of 16-bit weights from those of their high and low bytes.
__device__ inline float joined(int high, int low) { return static_cast<float>(high * 256 + low); }

// V words first .. first + kCount - 1 of a group, added to the running sums.
template <class S, bool kPlain, int kCount>
__device__ inline void add_pass(const CudaAttendCall& call, const Lane& lane, const char* values,
                                int first, const GroupTiles& tiles,
                                const std::uint32_t (&weights)[kGroupTiles][S::kLaneColumns][2],
                                const GroupFactors<S>& factors, PackedSums<S>& total) {
  int sums[S::kLaneColumns][kCount * S::kWordBlocks][4] = {};
#pragma unroll
  for (int t = 0; t < kGroupTiles; ++t) {
    // Tile 0 without a condition, so that its sums start at nothing: weights 0 where it is not.
    if (!kPlain && t > 0 && !tiles.has(t)) continue;
    add_words<S, kCount>(call, lane, values + t * S::kValueBytes, first, weights[t], sums);
  }
#pragma unroll
  for (int j = 0; j < S::kLaneColumns; ++j) {
#pragma unroll
    for (int r = 0; r < kCount * S::kWordBlocks; ++r) {
      const int (&sum)[4] = sums[j][r];
      float (&out)[2] = total.out[j][first * S::kWordBlocks + r];
      out[0] = fmaf(joined(sum[0], sum[1]), factors.added[j], out[0]);
      out[1] = fmaf(joined(sum[2], sum[3]), factors.added[j], out[1]);
    }
  }
}

// Weights times V mids, and weights, of a group: rows g and g + 8 of one MMA a tile.
template <class S, bool kPlain>
__device__ inline void add_mids(const Lane& lane, const char* warp, const GroupTiles& tiles,
                                const std::uint32_t (&weights)[kGroupTiles][S::kLaneColumns][2],
                                const GroupFactors<S>& factors, PackedSums<S>& total) {
  constexpr std::uint32_t kOnes8 = 0x01010101u;
  constexpr float kMiddle = 0.5f * static_cast<float>(max_code(S::kVBits));
  int sums[S::kLaneColumns][4] = {};
#pragma unroll
  for (int t = 0; t < kGroupTiles; ++t) {
    if (!kPlain && t > 0 && !tiles.has(t)) continue;
    const uint2 mid =
        *reinterpret_cast<const uint2*>(warp + t * S::kTileBytes + S::kMids + 8 * lane.c);
#pragma unroll
    for (int j = 0; j < S::kLaneColumns; ++j) {
      mma_s8(sums[j], mid.x, kOnes8, mid.y, kOnes8, weights[t][j][0], weights[t][j][1]);
    }
  }
#pragma unroll
  for (int j = 0; j < S::kLaneColumns; ++j) {
    const float mid = kVMidUnit * joined(sums[j][0], sums[j][1]);
    const float group = fmaf(-kMiddle, joined(sums[j][2], sums[j][3]), mid);
    total.mid[j] = fmaf(group, factors.added[j], total.mid[j]);
  }
}

template <class S, bool kPlain>
__device__ inline void add_group(const CudaAttendCall& call, const Lane& lane, const char* warp,
                                 const GroupTiles& tiles,
                                 const std::uint32_t (&weights)[kGroupTiles][S::kLaneColumns][2],
                                 const GroupFactors<S>& factors, PackedSums<S>& total) {
  if (factors.any_kept_less()) {
#pragma unroll
    for (int j = 0; j < S::kLaneColumns; ++j) {
      total.mid[j] *= factors.kept[j];
#pragma unroll
      for (int r = 0; r < 2 * S::kRowBlocks; ++r) total.out[j][r / 2][r % 2] *= factors.kept[j];
    }
  }
  add_mids<S, kPlain>(lane, warp, tiles, weights, factors, total);
#pragma unroll
  for (int first = 0; first + S::kPassWords <= S::kWords; first += S::kPassWords) {
    add_pass<S, kPlain, S::kPassWords>(call, lane, warp + S::kValues, first, tiles, weights,
                                       factors, total);
  }
  constexpr int kRest = S::kWords % S::kPassWords;
  if constexpr (kRest > 0) {
    add_pass<S, kPlain, kRest>(call, lane, warp + S::kValues, S::kWords - kRest, tiles, weights,
                               factors, total);
  }
}

// Rotated sums of the segment's columns, [column][head_dim].
template <class S>
__device__ inline void store_packed(const CudaAttendCall& call, const DecodePlan& plan,
                                    const Lane& lane, const PackedSums<S>& sums, float* partial) {
  const int dim = S::head_dim(call);
  const int group_channels = dim * S::kVBits / 8;
#pragma unroll
  for (int j = 0; j < S::kLaneColumns; ++j) {
    const int column = S::column(lane.c, j);
    if (column >= plan.slot_columns) continue;
#pragma unroll
    for (int r = 0; r < S::kRowBlocks; ++r) {
      const int word = value_word_index<S>(lane, r / S::kWordBlocks);
      if (!S::kWhole && word >= group_channels) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int group = 2 * (r % S::kWordBlocks) + i;
        const bool is_last = group == 8 / S::kVBits - 1;
        const float rest = is_last ? 0.0f : i == 0 ? sums.out[j][r][1] : sums.out[j][r + 1][0];
        const float unit = 1.0f / static_cast<float>(1 << S::kVBits * group);
        partial[column * dim + group * group_channels + word] =
            fmaf(sums.out[j][r][i] - rest, unit, sums.mid[j]);
      }
    }
  }
}

}  // namespace oscar::cuda
