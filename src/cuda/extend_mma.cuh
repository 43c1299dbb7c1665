// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The extend kernel with mma.sync, for every GPU from sm_80 on and every head_dim. All warps unpack
// a unit into shared memory, then each multiplies it with its own 16 or 32 rows; two blocks share a
// multiprocessor, so one unpacks while the other multiplies.
#pragma once

#include "cuda/extend_output.cuh"

namespace oscar::cuda {

// kRows: 128, or 64 where that does not fit the device's shared memory (more than 128 channels on
// GPUs with 99 KiB): V is then unpacked to where K was.
template <int kDim, int kRows>
struct MmaShape {
  static constexpr int kPaddedDim = kDim;
  static constexpr int kBlockRows = kRows;
  static constexpr bool kOneOperand = kRows == 64;
  static constexpr int kWarps = kDim == 256 && !kOneOperand ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowBlocks = kRows / 16 / kWarps;  // of 16 rows, a warp
  static constexpr int kBlocksPerSm = kDim == 256 ? 1 : 2;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kOperandBytes = kUnitTokens * kDim * 2;
  static constexpr int kValueOffset = kQueryBytes + (kOneOperand ? 0 : kOperandBytes);
  static constexpr int kRawOffset = kValueOffset + kOperandBytes;
  static constexpr int kParameterBytes = kWarps * static_cast<int>(sizeof(TokenParameters));
  static constexpr int shared_bytes(const TileLayout& tile) {
    return kRawOffset + kParameterBytes + kUnitTiles * tile.tile_bytes();
  }
};

// What a warp keeps in registers: kRowBlocks blocks of 16 rows.
template <class Shape>
struct WarpRows {
  static constexpr int kN = Shape::kPaddedDim / 8;
  static constexpr int kM = Shape::kRowBlocks;
  float o[kM][kN][4] = {};
  SoftmaxRows softmax[kM];
  float multiplier[kM][2];  // of the scores
  int position[kM][2];
  RowCenters centers[kM];  // of exact units 0
};

// Of a warp's rows with a unit's tokens.
template <class Shape>
using UnitScores = float[Shape::kRowBlocks][kUnitTokens / 8][4];

// Shared memory of a block.
template <class Shape>
struct MmaShared {
  char* query;

  [[nodiscard]] __device__ char* keys() const { return query + Shape::kQueryBytes; }
  [[nodiscard]] __device__ char* values() const { return query + Shape::kValueOffset; }
  [[nodiscard]] __device__ TokenParameters* parameters() const {
    return reinterpret_cast<TokenParameters*>(query + Shape::kRawOffset);
  }
  [[nodiscard]] __device__ char* raw() const {
    return query + Shape::kRawOffset + Shape::kParameterBytes;
  }
};

// The warp's rows of Q as fp16 operands at `shared`, and the multipliers of their scores.
template <class Shape>
__device__ inline void load_warp_query(const CudaAttendCall& call, const RowBlock& block,
                                       bool rotate, char* shared, WarpRows<Shape>& warp_rows) {
  constexpr int kM = Shape::kRowBlocks;
  const int row0 = static_cast<int>(threadIdx.x) / 32 * 16 * kM;
  __syncwarp();  // every lane has read the rows that were there before
  const float unit = rotate ? kLog2e * static_cast<float>(1 << kKeyShift) : kLog2e;
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const RowFactors row = load_query<Shape::kPaddedDim / 8>(call, block, row0 + 8 * i, rotate,
                                                             shared, Shape::kBlockRows);
    warp_rows.multiplier[i / 2][i % 2] = unit * row.multiplier;
    warp_rows.centers[i / 2].of[i % 2] = kLog2e * row.center;
  }
  __syncwarp();
}

// Scores of one unit, then their weights.
template <class Shape, bool kFull>
__device__ inline void weigh_unit(const CudaAttendCall& call, const RowBlock& block, bool packed,
                                  bool partial, int first, int end, const MmaShared<Shape>& shared,
                                  WarpRows<Shape>& rows, UnitScores<Shape>& s) {
  constexpr int kPaddedDim = Shape::kPaddedDim;
  constexpr int kM = Shape::kRowBlocks;
  constexpr int kN = kUnitTokens / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int q_row = static_cast<int>(threadIdx.x) / 32 * 16 * kM + lane % 16;
  const int b_row = lane % 8 + lane / 16 * 8;  // row of a pair of B operands
  const int b_chunk = lane / 8 % 2;
  const int head_dim = kFull ? kPaddedDim : call.layout.head_dim;
  const std::uint32_t q_operand = shared_address(shared.query);
  const std::uint32_t k_operand = shared_address(shared.keys());
#pragma unroll
  for (int k = 0; k < kPaddedDim / 16; ++k) {
    if (!kFull && 16 * k >= head_dim) break;
    std::uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ldmatrix_x4(a[m], q_operand + k / 4 * Shape::kBlockRows * 128 +
                            swizzled(q_row + 16 * m, k % 4 * 2 + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      std::uint32_t b[4];
      ldmatrix_x4(
          b, k_operand + k / 4 * kUnitTokens * 128 + swizzled(8 * n + b_row, k % 4 * 2 + b_chunk));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16(s[m][n], a[m], b[0], b[1]);
        mma_m16n8k16(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    if (partial) mask_scores(call.layout, block, packed, first, end, rows.position[m], s[m]);
    float multiplier[2] = {rows.multiplier[m][0], rows.multiplier[m][1]};
    if (call.options.softcap > 0.0f) {
      cap_scores(call.options.softcap, multiplier, rows.centers[m], s[m]);
      multiplier[0] = multiplier[1] = kLog2e;
    }
    float factor[2];
    if (update_softmax(multiplier, s[m], rows.softmax[m], factor)) {
#pragma unroll
      for (int n = 0; n < kPaddedDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rows.o[m][n][i] *= factor[i / 2];
      }
    }
  }
}

// Their sums.
template <class Shape, bool kFull>
__device__ inline void sum_unit(const CudaAttendCall& call, const MmaShared<Shape>& shared,
                                const UnitScores<Shape>& s, WarpRows<Shape>& rows) {
  constexpr int kPaddedDim = Shape::kPaddedDim;
  constexpr int kM = Shape::kRowBlocks;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int b_row = lane % 8 + lane / 16 * 8;
  const int b_chunk = lane / 8 % 2;
  const int head_dim = kFull ? kPaddedDim : call.layout.head_dim;
  const std::uint32_t v_operand = shared_address(shared.values());
#pragma unroll
  for (int k = 0; k < kUnitTokens / 16; ++k) {
    std::uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = &s[m][2 * k + i / 2][i % 2 * 2];
        a[m][i] = pack_weights(x[0], x[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kPaddedDim / 8; n += 2) {
      if (!kFull && 8 * n >= head_dim) break;
      std::uint32_t b[4];
      ldmatrix_x4(b, v_operand + swizzled(8 * n + b_row, 2 * k + b_chunk));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16(rows.o[m][n], a[m], b[0], b[1]);
        mma_m16n8k16(rows.o[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Units unit .. stop - 1, all of packed tiles.
template <class Shape, bool kFull>
__device__ inline void attend_packed_units(const CudaAttendCall& call, const RowBlock& block,
                                           const Units& units, int unit, int stop,
                                           const MmaShared<Shape>& shared, WarpRows<Shape>& rows) {
  constexpr int kThreads = Shape::kThreads;
  constexpr Fill kFirst = Shape::kOneOperand ? Fill::kKeys : Fill::kBoth;
  const int thread = static_cast<int>(threadIdx.x);
  const int tile_bytes = call.layout.tile().tile_bytes();
  const auto unpack = [&]<Fill kFill>() {
    fill_packed<Shape::kPaddedDim, kFull, kThreads, kFill>(
        call.layout, shared.raw(), thread, shared.parameters(), shared.keys(), shared.values());
    __syncthreads();
  };
  prefetch_packed<kThreads>(UnitTiles(call, block, units, unit), tile_bytes, thread, shared.raw());
  UnitTiles next(call, block, units, unit + 1);
  load_warp_query<Shape>(call, block, true, shared.query, rows);
  for (; unit < stop; ++unit) {
    const auto fetch_next = [&] {
      if (unit + 1 >= stop) return;
      prefetch_packed<kThreads>(next, tile_bytes, thread, shared.raw());
      next = UnitTiles(call, block, units, unit + 2);
    };
    cp_async_wait<0>();
    __syncthreads();  // the tiles are here, and nobody reads the last operands any more
    unpack.template operator()<kFirst>();
    if constexpr (!Shape::kOneOperand) fetch_next();
    UnitScores<Shape> s = {};
    weigh_unit<Shape, kFull>(call, block, true, units.is_partial(unit),
                             units.first_tile(unit) * kTileTokens, units.tile_end * kTileTokens,
                             shared, rows, s);
    if constexpr (Shape::kOneOperand) {
      __syncthreads();
      unpack.template operator()<Fill::kValues>();
      fetch_next();
    }
    sum_unit<Shape, kFull>(call, shared, s, rows);
  }
#pragma unroll
  for (int m = 0; m < Shape::kRowBlocks; ++m) {
    add_center(call.options, rows.centers[m], rows.softmax[m]);
    unrotate_sums<Shape::kPaddedDim>(call.layout.head_dim, rows.o[m]);
  }
}

// Units unit .. stop - 1, all of exact tokens.
template <class Shape, bool kFull>
__device__ inline void attend_exact_units(const CudaAttendCall& call, const RowBlock& block,
                                          const Units& units, int unit, int stop,
                                          const MmaShared<Shape>& shared, WarpRows<Shape>& rows) {
  constexpr Fill kFirst = Shape::kOneOperand ? Fill::kKeys : Fill::kBoth;
  const int thread = static_cast<int>(threadIdx.x);
  load_warp_query<Shape>(call, block, false, shared.query, rows);
  for (; unit < stop; ++unit) {
    const int first = units.first_token(unit);
    const int end = units.end_token(call.layout, unit);
    const auto fill = [&]<Fill kFill>() {
      __syncthreads();
      fill_exact<Shape::kPaddedDim, Shape::kThreads, kFill>(call, block, first, end, thread,
                                                            shared.keys(), shared.values());
      __syncthreads();
    };
    fill.template operator()<kFirst>();
    UnitScores<Shape> s = {};
    weigh_unit<Shape, kFull>(call, block, false, units.is_partial(unit), first, end, shared, rows,
                             s);
    if constexpr (Shape::kOneOperand) fill.template operator()<Fill::kValues>();
    sum_unit<Shape, kFull>(call, shared, s, rows);
  }
}

template <class Shape, bool kFull>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    extend_mma(const __grid_constant__ CudaAttendCall call, Splits splits) {
  constexpr int kM = Shape::kRowBlocks;
  extern __shared__ __align__(1024) char bytes[];
  const MmaShared<Shape> shared{bytes};
  const int index = static_cast<int>(blockIdx.x) / splits.count;
  const int split = static_cast<int>(blockIdx.x) % splits.count;
  RowBlock block;
  if (!find_row_block(call, index, static_cast<int>(blockIdx.y), Shape::kBlockRows, block)) return;
  const Units units = units_of(call.layout, block);
  const int total = units.count();
  const int unit = static_cast<int>(static_cast<std::int64_t>(total) * split / splits.count);
  const int stop = static_cast<int>(static_cast<std::int64_t>(total) * (split + 1) / splits.count);

  const int thread = static_cast<int>(threadIdx.x);
  WarpRows<Shape> rows;
  const int row0 = thread / 32 * 16 * kM + thread % 32 / 4;
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    rows.position[i / 2][i % 2] = block.position(min(row0 + 8 * i, block.rows - 1));
  }
  const int packed_stop = min(stop, units.packed);
  if (unit < packed_stop) {
    attend_packed_units<Shape, kFull>(call, block, units, unit, packed_stop, shared, rows);
  }
  const int exact_start = max(unit, packed_stop);
  if (exact_start < stop) {
    attend_exact_units<Shape, kFull>(call, block, units, exact_start, stop, shared, rows);
  }
  float* partial = splits.count == 1
                       ? nullptr
                       : partial_of(call, splits, block.kv_head, index, split, Shape::kBlockRows);
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    store_row_sums(call, block, row0 + 8 * i, i % 2, rows.o[i / 2], rows.softmax[i / 2], partial,
                   Shape::kBlockRows);
  }
}

}  // namespace oscar::cuda
