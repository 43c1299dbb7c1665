// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Exact tokens where query, ring and the call's rows are all fp16 or all bf16: operands of the
// tensor cores as they are in memory. Weights in bf16 are two terms, 16 bits together. All but
// the products is the same code for both: what is not there need not come from memory.
#pragma once

#include <cstdint>

#include "cuda/attend_exact.cuh"

namespace oscar::cuda {

template <class S>
struct ExactHalf {
  static constexpr int kSteps = S::kPad / 16;  // of 16 channels
  static constexpr int kRowBytes = 2 * S::kPad;

  // The query as operand B: channels 16 s + 2 c, + 1, + 8 and + 9 of column g. `queries`: its rows.
  std::uint32_t query[S::kBlocks][kSteps][2];
  bool is_bf16;
  int last_part;  // in slot 0

  __device__ void load_query(const CudaAttendCall& call, const Lane& lane, int last,
                             const std::byte* const (&queries)[S::kBlocks]) {
    last_part = last;
    is_bf16 = call.q.dtype == DType::kBF16;
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) {
      const auto* pairs = kept(reinterpret_cast<const std::uint32_t*>(queries[n]) + lane.c);
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        const bool exists = S::kWhole || 8 * i + 2 * lane.c < S::head_dim(call);
        query[n][i / 2][i % 2] = exists ? pairs[4 * i] : 0u;
      }
    }
  }

  // What load_raw_query reads for the item's tiles.
  __device__ void leave_query(const CudaAttendCall&, const DecodePlan& plan, const DecodeItem& item,
                              const Lane& lane, RawQuery<S>* to) const {
    constexpr int kOwn = QueryPart<S>::kChannels / kChunk;
    constexpr int kGroup = S::kLaneChannels / kChunk;
#pragma unroll
    for (int n = 0; n < S::kBlocks; ++n) {
      const bool used = column_of(plan, item, 8 * n + lane.g).used;
      if (S::kSparse && lane.g >= 4) continue;
#pragma unroll
      for (int j = 0; j < 2 * kSteps; ++j) {
        const int g = S::kSparse ? 2 * lane.g + j % kGroup / kOwn : lane.g;
        auto* words = reinterpret_cast<std::uint32_t*>(&to[4 * g + j / kGroup].chunks[n][j % kOwn]);
        words[lane.c] = used ? query[n][j / 2][j % 2] : 0u;
      }
    }
  }

  // A slot: 16 rows of K, then 16 of V, chunks of 16 bytes permuted so that those of eight rows are
  // in different banks.
  static_assert(sizeof(ExactTile<S>::bounds) <= S::kExactRows);
  static_assert(2 * kExactTokens * kRowBytes == S::kExactSlotBytes);
  __device__ std::uint32_t slot_of(const ExactTile<S>& tile, int part) const {
    return shared_address(&tile) + S::kExactRows +
           static_cast<unsigned>(last_part - part) % S::kExactSlots * S::kExactSlotBytes;
  }

  // row: that of each lane (find_row); channels past head_dim are 0.
  __device__ void stage(const CudaAttendCall& call, const Lane& lane, int part,
                        const std::byte* row, const ExactTile<S>& tile) const {
    constexpr int kChunks = S::kPad / 8;
    const auto index = static_cast<unsigned>(lane.index);
    const auto chunk = static_cast<int>(index % kChunks);
    const bool exists = S::kWhole || 8 * chunk < S::head_dim(call);
    const std::uint32_t to = slot_of(tile, part);
#pragma unroll 2
    for (int first = 0; first < 2 * kExactTokens; first += 32 / kChunks) {
      const int t = first + static_cast<int>(index / kChunks);
      const std::byte* from = row_of_lane(row, t);
      cp_async_16_or_zero(to + t * kRowBytes + 16 * (chunk ^ (t & 7)),
                          from + (exists ? 16 * chunk : 0), exists);
    }
  }

  // Chunks 2 i and 2 i + 1 of eight rows each: `own` is where the lane's row has its chunk of i 0.
  __device__ static std::uint32_t chunk_pair(std::uint32_t own, int i) {
    return (own ^ 32 * (i % 4)) + 128 * (i / 4);
  }

  // Scores of tokens g and g + 8, columns 2 c and 2 c + 1.
  __device__ void score(const CudaAttendCall&, const DecodeSequence&, const Lane& lane, int part,
                        const std::byte*, const ExactTile<S>& tile,
                        float (&scores)[S::kBlocks][4]) const {
    const auto t = static_cast<unsigned>(lane.index) % 16;
    const std::uint32_t own =
        slot_of(tile, part) + t * kRowBytes + 16 * (static_cast<unsigned>(lane.index) / 16 ^ t % 8);
    if (is_bf16) {
      score_rows<DType::kBF16>(own, scores);
    } else {
      score_rows<DType::kF16>(own, scores);
    }
  }

  // Channel of block h of a lane.
  __device__ static int channel(const Lane& lane, int h) { return 8 * h + lane.g; }

  __device__ void add(const CudaAttendCall&, const DecodeSequence&, const Lane& lane, int part,
                      const std::byte*, const ExactTile<S>& tile,
                      const float (&exact)[S::kBlocks][4], ExactSums<S>& sums) const {
    const auto index = static_cast<unsigned>(lane.index);
    const unsigned t = kExactTokens + index % 8 + 8 * (index / 16);
    const std::uint32_t own =
        slot_of(tile, part) + t * kRowBytes + 16 * (index / 8 % 2 ^ index % 8);
    if (is_bf16) {
      add_rows<DType::kBF16>(own, exact, sums);
    } else {
      add_rows<DType::kF16>(own, exact, sums);
    }
  }

 private:
  template <DType kType>
  __device__ void score_rows(std::uint32_t own, float (&scores)[S::kBlocks][4]) const {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      std::uint32_t a[4];
      ldmatrix_x4(a, chunk_pair(own, s));
#pragma unroll
      for (int n = 0; n < S::kBlocks; ++n) {
        mma<kType>(scores[n], a, query[n][s][0], query[n][s][1]);
      }
    }
  }

  template <DType kType>
  __device__ static void add_rows(std::uint32_t own, const float (&exact)[S::kBlocks][4],
                                  ExactSums<S>& sums) {
    std::uint32_t high[S::kBlocks][2], low[S::kBlocks][2];  // tokens 2 c, + 1, and + 8 and + 9
#pragma unroll
    for (int i = 0; i < 2 * S::kBlocks; ++i) {
      split_weights<kType>(exact[i / 2][i % 2 * 2], exact[i / 2][i % 2 * 2 + 1], high[i / 2][i % 2],
                           low[i / 2][i % 2]);
    }
#pragma unroll
    for (int r = 0; r < S::kPad / 16; ++r) {
      std::uint32_t a[4];
      ldmatrix_x4_transposed(a, chunk_pair(own, r));
#pragma unroll
      for (int n = 0; n < S::kBlocks; ++n) {
        mma<kType>(sums.out[n][r], a, high[n][0], high[n][1]);
        if constexpr (kType == DType::kBF16) {
          mma<kType>(sums.out[n][r], a, low[n][0], low[n][1]);
        }
      }
    }
  }

  template <DType kType>
  __device__ static void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                             std::uint32_t b1) {
    if constexpr (kType == DType::kBF16) {
      mma_bf16(c, a[0], a[1], a[2], a[3], b0, b1);
    } else {
      mma_f16(c, a[0], a[1], a[2], a[3], b0, b1, c);
    }
  }

  template <DType kType>
  __device__ static void split_weights(float a, float b, std::uint32_t& high, std::uint32_t& low) {
    if constexpr (kType == DType::kBF16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
      const float2 back = __bfloat1622float2(pair);
      const __nv_bfloat162 rest = __floats2bfloat162_rn(a - back.x, b - back.y);
      high = transpose_8x8(reinterpret_cast<const std::uint32_t&>(pair));
      low = transpose_8x8(reinterpret_cast<const std::uint32_t&>(rest));
    } else {
      const __half2 pair = __floats2half2_rn(a, b);
      high = transpose_8x8(reinterpret_cast<const std::uint32_t&>(pair));
      low = 0;
    }
  }
};

}  // namespace oscar::cuda
