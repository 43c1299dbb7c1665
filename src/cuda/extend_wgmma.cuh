// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The extend kernel for sm_90a and head_dim 64, 128, 256. One warpgroup unpacks units into a ring
// of operands in shared memory; two warpgroups multiply them with 64 rows each. A warpgroup
// computes the scores of one unit while it still sums the values of the one before (as
// FlashAttention-3).
#pragma once

#include "cuda/extend_output.cuh"
#include "cuda/wgmma.cuh"

namespace oscar::cuda {

template <int kHeadDim>
struct WgmmaShape {
  static constexpr int kGroup = 128;  // threads of a warpgroup
  // Warpgroups that unpack; the values of head_dim 256 leave registers for one only.
  static constexpr int kUnpackers = kHeadDim == 256 ? 1 : 2;
  static constexpr int kThreads = (kUnpackers + 2) * kGroup;
  static constexpr int kBlockRows = 128;
  // Scores of one unit while the values of the one before are summed: if registers allow.
  static constexpr bool kOverlap = kHeadDim <= 128;
  static constexpr int kStages = kHeadDim == 256 ? 2 : 4;
  static constexpr int kQueryBytes = kBlockRows * kHeadDim * 2;
  static constexpr int kOperandBytes = kUnitTokens * kHeadDim * 2;
  static constexpr int kParameterOffset = kQueryBytes + kStages * 2 * kOperandBytes;
  static constexpr int kParameterBytes = kUnpackers * 4 * static_cast<int>(sizeof(TokenParameters));
  static constexpr int kBarrierOffset = kParameterOffset + kParameterBytes;
  static constexpr int kRawOffset = kBarrierOffset + 128;
  static constexpr int shared_bytes(const TileLayout& tile) {
    return kRawOffset + kUnpackers * 2 * kUnitTiles * tile.tile_bytes();
  }
  // Registers a thread: 128 x 104 + 256 x 200 or 256 x (104 + 152), (112 + 144); at most 65536.
  // With 96 to unpack, more is spilled and 2048 queries over 32K take 5 % longer.
  static constexpr int kUnpackRegisters = kHeadDim == 64 ? 112 : 104;
  static constexpr int kMultiplyRegisters = kUnpackers == 1 ? 200 : 256 - kUnpackRegisters;
};

// Which stage of the ring the n-th unit of a block takes, and the parity of its barriers.
template <int kStages>
struct Stage {
  int index;
  int parity;
  __device__ explicit Stage(int n) : index(n % kStages), parity(n / kStages & 1) {}
};

struct Ring {
  std::uint64_t* full;     // [stages], an arrival of each unpacking warp
  std::uint64_t* empty;    // [stages], an arrival of each multiplying warp
  std::uint64_t* arrived;  // [unpackers, 2], the tiles of a unit
};

// Starts the copy of one tile of a unit by one thread; without a page for it there is none.
__device__ inline void copy_tile(const std::uint8_t* tile, int bytes, char* raw,
                                 std::uint64_t* arrived) {
  barrier_expect(arrived, tile == nullptr ? 0 : bytes);
  if (tile != nullptr) bulk_copy(raw, tile, bytes, arrived);
}

// An unpacking warpgroup: every kUnpackers-th of the units [begin, stop), in order.
template <int kHeadDim>
__device__ inline void produce_units(const CudaAttendCall& call, const RowBlock& block,
                                     const Units& units, int begin, int stop, char* shared,
                                     const Ring& ring) {
  using Shape = WgmmaShape<kHeadDim>;
  constexpr int kStep = Shape::kUnpackers;
  const int bytes = call.layout.tile().tile_bytes();
  const int thread = static_cast<int>(threadIdx.x) % Shape::kGroup;
  const int group = static_cast<int>(threadIdx.x) / Shape::kGroup;
  auto* const parameters =
      reinterpret_cast<TokenParameters*>(shared + Shape::kParameterOffset) + 4 * group;
  char* raw = shared + Shape::kRawOffset + group * 2 * kUnitTiles * bytes;
  std::uint64_t* arrived = ring.arrived + 2 * group;
  int other = kUnitTiles * bytes;  // from one buffer of the warpgroup to the next
  const int packed_stop = min(stop, units.packed);
  // Threads 0 and 1 fetch a tile each, and look up the one after it long before they need it.
  const bool fetches = thread < kUnitTiles;
  const std::uint8_t* next = nullptr;
  if (fetches && begin + group < packed_stop) {
    const std::uint8_t* tile = unit_tile(call, block, units, begin + group, thread);
    copy_tile(tile, bytes, raw + thread * bytes, arrived);
    next = unit_tile(call, block, units, begin + group + kStep, thread);
  }
  int parity = 0;
  for (int unit = begin + group; unit < stop; unit += kStep) {
    const Stage<Shape::kStages> stage(unit - begin);
    char* const k_operand = shared + Shape::kQueryBytes + stage.index * 2 * Shape::kOperandBytes;
    char* const v_operand = k_operand + Shape::kOperandBytes;
    named_barrier(1 + group, Shape::kGroup);  // the last unit's tiles are used up
    if (unit < packed_stop) {
      if (fetches && unit + kStep < packed_stop) {
        copy_tile(next, bytes, raw + other + thread * bytes, arrived + (other > 0 ? 1 : -1));
        next = unit_tile(call, block, units, unit + 2 * kStep, thread);
      }
      barrier_wait(arrived, parity >> 1);
      barrier_wait(ring.empty + stage.index, stage.parity ^ 1);
      fill_packed<kHeadDim, true, Shape::kGroup>(call.layout, raw, thread, parameters, k_operand,
                                                 v_operand);
      raw += other;
      arrived += other > 0 ? 1 : -1;
      other = -other;
      parity = (parity + 1) & 3;  // each of the two buffers comes every second time
    } else {
      barrier_wait(ring.empty + stage.index, stage.parity ^ 1);
      fill_exact<kHeadDim, Shape::kGroup>(call, block, units.first_token(unit),
                                          units.end_token(call.layout, unit), thread, k_operand,
                                          v_operand);
    }
    fence_shared_for_wgmma();
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(ring.full + stage.index);
  }
}

// What a warp of a multiplying warpgroup keeps in registers: 16 rows.
template <int kHeadDim>
struct GroupRows {
  static constexpr int kPart = kHeadDim < 128 ? kHeadDim : 128;  // columns of one wgmma
  static constexpr int kParts = kHeadDim / kPart;
  float o[kParts][kPart / 8][4] = {};
  SoftmaxRows softmax;
  float multiplier[2];
  int position[2];
  RowCenters centers;  // of exact units 0
};

// Starts s = Q K^T of a unit.
template <int kHeadDim>
__device__ inline void start_scores(std::uint32_t q_operand, std::uint32_t k_operand,
                                    float (&s)[kUnitTokens / 8][4]) {
  constexpr int kRows = WgmmaShape<kHeadDim>::kBlockRows;
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    wgmma_f16(s, wgmma_operand(q_operand + k / 4 * kRows * 128) + k % 4 * 2,
              wgmma_operand(k_operand + k / 4 * kUnitTokens * 128) + k % 4 * 2, k > 0);
  }
  wgmma_commit();
}

// Starts o += P V of a unit.
template <int kHeadDim>
__device__ inline void start_sums(const std::uint32_t (&p)[kUnitTokens / 16][4],
                                  std::uint32_t v_operand, GroupRows<kHeadDim>& rows) {
  using Rows = GroupRows<kHeadDim>;
#pragma unroll
  for (int k = 0; k < kUnitTokens / 16; ++k) {
#pragma unroll
    for (int part = 0; part < Rows::kParts; ++part) {
      wgmma_f16(rows.o[part], p[k], wgmma_operand(v_operand + part * Rows::kPart * 128) + k * 2,
                true);
    }
  }
  wgmma_commit();
}

// Scores to fp16 weights; factor of the sums so far.
template <int kHeadDim>
__device__ inline bool weigh(const CudaAttendCall& call, const RowBlock& block, const Units& units,
                             int unit, float (&s)[kUnitTokens / 8][4], GroupRows<kHeadDim>& rows,
                             float (&factor)[2]) {
  if (units.is_partial(unit)) {
    const bool packed = unit < units.packed;
    mask_scores(call.layout, block, packed,
                packed ? units.first_tile(unit) * kTileTokens : units.first_token(unit),
                packed ? units.tile_end * kTileTokens : units.end_token(call.layout, unit),
                rows.position, s);
  }
  float multiplier[2] = {rows.multiplier[0], rows.multiplier[1]};
  if (call.options.softcap > 0.0f) {
    cap_scores(call.options.softcap, multiplier, rows.centers, s);
    multiplier[0] = multiplier[1] = kLog2e;
  }
  return update_softmax(multiplier, s, rows.softmax, factor);
}

template <int kHeadDim>
__device__ inline void rescale(const float (&factor)[2], GroupRows<kHeadDim>& rows) {
#pragma unroll
  for (auto& part : rows.o) {
#pragma unroll
    for (auto& o : part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[i] *= factor[i / 2];
    }
  }
}

__device__ inline void pack_unit(const float (&s)[kUnitTokens / 8][4],
                                 std::uint32_t (&p)[kUnitTokens / 16][4]) {
#pragma unroll
  for (int k = 0; k < kUnitTokens / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* x = &s[2 * k + i / 2][i % 2 * 2];
      p[k][i] = pack_weights(x[0], x[1]);
    }
  }
}

// A multiplying warpgroup over units [first, stop), all packed or all exact; begin: of the block.
template <int kHeadDim>
__device__ inline void consume_units(const CudaAttendCall& call, const RowBlock& block,
                                     const Units& units, int begin, int first, int stop,
                                     std::uint32_t shared, std::uint32_t q_operand,
                                     const Ring& ring, GroupRows<kHeadDim>& rows) {
  using Shape = WgmmaShape<kHeadDim>;
  float s[kUnitTokens / 8][4];
  std::uint32_t p[kUnitTokens / 16][4];
  float factor[2];
  const auto operand = [&](int unit) {
    return shared + Shape::kQueryBytes +
           Stage<Shape::kStages>(unit - begin).index * 2 * Shape::kOperandBytes;
  };
  const auto wait_full = [&](int unit) {
    const Stage<Shape::kStages> stage(unit - begin);
    barrier_wait(ring.full + stage.index, stage.parity);
  };
  const auto release = [&](int unit) {
    if (threadIdx.x % 32 == 0) {
      barrier_arrive(ring.empty + Stage<Shape::kStages>(unit - begin).index);
    }
  };
  wait_full(first);
  wgmma_fence();
  start_scores<kHeadDim>(q_operand, operand(first), s);
  wgmma_wait<0>();
  pin(s);
  if (weigh(call, block, units, first, s, rows, factor)) rescale(factor, rows);
  pack_unit(s, p);
  for (int unit = first + 1; unit < stop; ++unit) {
    if constexpr (Shape::kOverlap) wait_full(unit);
    pin(s);
    for (auto& part : rows.o) pin(part);
    wgmma_fence();
    if constexpr (Shape::kOverlap) start_scores<kHeadDim>(q_operand, operand(unit), s);
    start_sums(p, operand(unit - 1) + Shape::kOperandBytes, rows);
    bool changed = false;
    if constexpr (Shape::kOverlap) {
      wgmma_wait<1>();
      pin(s);
      changed = weigh(call, block, units, unit, s, rows, factor);
    }
    wgmma_wait<0>();
    for (auto& part : rows.o) pin(part);
    release(unit - 1);
    if constexpr (!Shape::kOverlap) {
      wait_full(unit);
      wgmma_fence();
      start_scores<kHeadDim>(q_operand, operand(unit), s);
      wgmma_wait<0>();
      pin(s);
      changed = weigh(call, block, units, unit, s, rows, factor);
    }
    if (changed) rescale(factor, rows);
    pack_unit(s, p);
  }
  for (auto& part : rows.o) pin(part);
  wgmma_fence();
  start_sums(p, operand(stop - 1) + Shape::kOperandBytes, rows);
  wgmma_wait<0>();
  for (auto& part : rows.o) pin(part);
  release(stop - 1);
}

// The warp's 16 rows of Q, for the whole warpgroup visible to wgmma.
template <int kHeadDim>
__device__ inline void load_group_query(const CudaAttendCall& call, const RowBlock& block, int row0,
                                        bool rotate, int barrier, char* shared,
                                        GroupRows<kHeadDim>& rows) {
  const float unit = rotate ? kLog2e * static_cast<float>(1 << kKeyShift) : kLog2e;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const RowFactors row = load_query<kHeadDim / 8>(call, block, row0 + 8 * i, rotate, shared,
                                                    WgmmaShape<kHeadDim>::kBlockRows);
    rows.multiplier[i] = unit * row.multiplier;
    rows.centers.of[i] = kLog2e * row.center;
  }
  fence_shared_for_wgmma();
  named_barrier(barrier, WgmmaShape<kHeadDim>::kGroup);
}

template <int kHeadDim>
__device__ inline void multiply_units(const CudaAttendCall& call, const RowBlock& block,
                                      const Units& units, int begin, int stop, char* shared,
                                      const Ring& ring, float* partial) {
  using Shape = WgmmaShape<kHeadDim>;
  const int group = static_cast<int>(threadIdx.x) / Shape::kGroup - Shape::kUnpackers;
  const int row0 = 64 * group + static_cast<int>(threadIdx.x) % Shape::kGroup / 32 * 16;
  const int r = row0 + static_cast<int>(threadIdx.x) % 32 / 4;
  const std::uint32_t address = shared_address(shared);
  const std::uint32_t q_operand = address + 64 * group * 128;
  GroupRows<kHeadDim> rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) rows.position[i] = block.position(min(r + 8 * i, block.rows - 1));
  auto& o = reinterpret_cast<float (&)[kHeadDim / 8][4]>(rows.o);
  const int packed_stop = min(stop, units.packed);
  if (begin < packed_stop) {
    load_group_query(call, block, row0, true, 8 + group, shared, rows);
    consume_units(call, block, units, begin, begin, packed_stop, address, q_operand, ring, rows);
    add_center(call.options, rows.centers, rows.softmax);
    unrotate_sums<kHeadDim>(kHeadDim, o);
    named_barrier(8 + group, Shape::kGroup);  // the scores of every warp have read Q
  }
  const int exact_begin = max(begin, packed_stop);
  if (exact_begin < stop) {
    load_group_query(call, block, row0, false, 8 + group, shared, rows);
    consume_units(call, block, units, begin, exact_begin, stop, address, q_operand, ring, rows);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    store_row_sums(call, block, r + 8 * i, i, o, rows.softmax, partial, Shape::kBlockRows);
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(WgmmaShape<kHeadDim>::kThreads, 1)
    extend_wgmma(const __grid_constant__ CudaAttendCall call, Splits splits) {
  using Shape = WgmmaShape<kHeadDim>;
  extern __shared__ __align__(1024) char shared[];
  const int index = static_cast<int>(blockIdx.x) / splits.count;
  const int split = static_cast<int>(blockIdx.x) % splits.count;
  RowBlock block;
  if (!find_row_block(call, index, static_cast<int>(blockIdx.y), Shape::kBlockRows, block)) return;
  const Units units = units_of(call.layout, block);
  const auto total = static_cast<std::int64_t>(units.count());
  const int begin = static_cast<int>(total * split / splits.count);
  const int stop = static_cast<int>(total * (split + 1) / splits.count);
  const Ring ring{reinterpret_cast<std::uint64_t*>(shared + Shape::kBarrierOffset),
                  reinterpret_cast<std::uint64_t*>(shared + Shape::kBarrierOffset) + 4,
                  reinterpret_cast<std::uint64_t*>(shared + Shape::kBarrierOffset) + 8};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      barrier_init(ring.full + i, 4);
      barrier_init(ring.empty + i, 8);
    }
    for (int i = 0; i < 2 * Shape::kUnpackers; ++i) barrier_init(ring.arrived + i, kUnitTiles);
    fence_shared_for_wgmma();
  }
  __syncthreads();
  if (threadIdx.x < Shape::kUnpackers * Shape::kGroup) {
    fewer_registers<Shape::kUnpackRegisters>();
    produce_units<kHeadDim>(call, block, units, begin, stop, shared, ring);
  } else {
    more_registers<Shape::kMultiplyRegisters>();
    float* partial = splits.count == 1
                         ? nullptr
                         : partial_of(call, splits, block.kv_head, index, split, Shape::kBlockRows);
    multiply_units<kHeadDim>(call, block, units, begin, stop, shared, ring, partial);
  }
}

}  // namespace oscar::cuda
