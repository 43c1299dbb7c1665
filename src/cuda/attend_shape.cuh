// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Constants of one instance of the decode kernel, and where its lanes stand in a tile.
//
// Lane 4 g + c of a warp has, in every tile,
//   K: the four tokens g, g + 8, g + 16, g + 24 of the channels from c kLaneChannels on,
//   V: the token quads 2 c and 2 c + 1 of every eighth channel (kWords words of each quad),
//   scores: those four tokens of kLaneColumns query columns.
// So a K word is one row of an MMA operand, a V word one column of it, and the rotated query of
// MMA column g stays in the registers of lane 4 g + c.
//
// The MMA that scores has blocks of 8 columns. Up to 4 query columns stand in the even ones, so
// that each lane has one of them; more stand side by side, two a lane and block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/plan_part.cuh"
#include "oscar/format.hpp"

namespace oscar::cuda {

// Shared memory that one block may use, without 12 KiB for static arrays and the system.
__host__ __device__ constexpr int shared_limit(int arch) {
  return (arch >= 900 ? 227 : 163) * 1024 - 12288;
}

// Of the code that is compiled; the host asks what that was (current_device).
#ifdef __CUDA_ARCH__
inline constexpr int kArch = __CUDA_ARCH__;
#else
inline constexpr int kArch = 900;
#endif

// kDim is head_dim, or with kAny the largest head_dim that the instance takes.
template <int kDim_, bool kAny_, int kKBits_, int kVBits_, int kLaneColumns_>
struct DecodeShape {
  static constexpr int kDim = kDim_;
  static constexpr bool kAny = kAny_;
  static constexpr int kKBits = kKBits_;
  static constexpr int kVBits = kVBits_;
  static constexpr int kLaneColumns = kLaneColumns_;  // 1, 2 or 4

  static constexpr int kPad = kDim <= 64 ? 64 : kDim <= 128 ? 128 : 256;
  static constexpr bool kWhole = !kAny && kDim == kPad;  // no lane is without channels
  static constexpr int kColumns = 4 * kLaneColumns;      // of an item
  static constexpr bool kSparse = kLaneColumns == 1;
  static constexpr int kBlocks = (kLaneColumns + 1) / 2;  // of 8 columns of the scoring MMA

  static constexpr int kLaneChannels = kPad / 4;
  static constexpr int kPairs = kLaneChannels / 2;
  static constexpr int kQuads = kLaneChannels / 4;            // of channels, in one parameter word
  static constexpr int kLines = kLaneChannels * kKBits / 32;  // K lines of a lane
  static constexpr int kLineQuads = 8 / kKBits;               // channel quads of a line
  static constexpr int kWords = (kDim * kVBits + 63) / 64;    // V words of a lane and token quad
  static constexpr int kWordBlocks = 4 / kVBits;              // blocks of 16 channels of a V word
  static constexpr int kRowBlocks = kWords * kWordBlocks;
  // V words of a quad at a time, so that their integer sums fit 32 registers.
  static constexpr int kMostWords = 8 / (kWordBlocks * kLaneColumns);
  static constexpr int kPassWords = kMostWords < 1 ? 1 : kWords < kMostWords ? kWords : kMostWords;

  static constexpr int kKeyBytes = 4 * kDim * kKBits;
  static constexpr int kValueBytes = 4 * kDim * kVBits;
  static constexpr int kTailBytes =
      TileLayout{kDim, {kKBits, kVBits}}.tile_bytes() - kKeyBytes - kValueBytes;

  // Shared memory of a warp: what each tile of a group has been unpacked to, where tiles are, the
  // raw tails (all that follows the codes), and the codes of a group.
  static constexpr int kScales = 0;                                    // fp16 [kPad], permuted
  static constexpr int kOffsets = kPad * 2;                            // float4 [block][4]
  static constexpr int kNorms = kOffsets + 64 * kBlocks;               // float [32]
  static constexpr int kLogScales = kNorms + 4 * kTileTokens;          // float [32]
  static constexpr int kInverseScales = kLogScales + 4 * kTileTokens;  // float [32]
  static constexpr int kMids = kInverseScales + 4 * kTileTokens;       // s8 [32]
  static constexpr int kTileBytes = kMids + kTileTokens;
  static constexpr int kBounds = kGroupTiles * kTileBytes;  // int2 [column]
  static constexpr int kValues = (kBounds + 8 * kColumns + 127) / 128 * 128;
  // In the same place, of exact tokens: bounds, then slots of 16 rows of K and 16 of V in 16 bits.
  // Where there are two, the first tails and keys behind exact tokens come into the second.
  static constexpr int kExactSlots = kPad <= 128 ? 2 : 1;
  static constexpr bool kAhead = kExactSlots == 2;
  static constexpr int kExactRows = 128 * kBlocks;
  static constexpr int kExactSlotBytes = 32 * 2 * kPad;
  static constexpr int kExactBytes = kExactRows + kExactSlots * kExactSlotBytes;
  static constexpr int kTails =
      std::max(kValues + kGroupTiles * kValueBytes, kAhead ? kExactRows + kExactSlotBytes : 0);
  static constexpr int kKeys = (kTails + kGroupTiles * kTailBytes + 127) / 128 * 128;
  static constexpr int kGroupBytes = kKeys + kGroupTiles * kKeyBytes;
  static constexpr int kPartialBytes = kColumns * (kDim + 2) * 4;  // in the same place at the end
  static constexpr int kTileOffsets =                              // DecodeFetch
      (std::max({kGroupBytes, kPartialBytes, kExactBytes}) + 127) / 128 * 128;
  static constexpr int kNextPages = kTileOffsets + 128;
  static constexpr int kState = kNextPages + 128;  // WarpState
  static constexpr int kWarpBytes = kState + (kBlocks == 1 ? 256 : 384);

  // As many warps as registers allow and shared memory holds: of more than 12 the loop would have
  // too few registers, and what it spilled would wait behind all the tiles under way.
  __host__ __device__ static constexpr int warps(int arch) {
    const int sums = kPad * kLaneColumns;
    int count = sums <= 128 ? kMostDecodeWarps : 8;
    while (count > 4 && count * kWarpBytes > shared_limit(arch)) {
      count -= count > 8 ? 4 : 2;
    }
    return count;
  }
  // Query column `j` of lane group c.
  __device__ static constexpr int column(int c, int j) {
    return kSparse ? c : 8 * (j / 2) + 2 * c + j % 2;
  }

  __device__ static int head_dim(const CudaAttendCall& call) {
    return kAny ? call.layout.head_dim : kDim;
  }
};

// Tiles begin .. end - 1 of group `group` of an item, and which tokens of them are seen: from
// tokens.x to tokens.y - 1.
struct GroupTiles {
  int group;
  int begin;
  int end;
  int2 tokens;

  [[nodiscard]] __device__ bool has(int t) const { return t >= begin && t < end; }
};

struct Lane {
  int index;
  int g;
  int c;
};

// Read again where it is used: what is computed from it then needs no register in between. `zero`:
// from memory, where the compiler would otherwise know that it is the same lane as before.
__device__ inline Lane fresh_lane(int zero = 0) {
  unsigned index;
  asm volatile("mov.u32 %0, %%laneid;\n" : "=r"(index));
  index ^= static_cast<unsigned>(zero);
  return {static_cast<int>(index), static_cast<int>(index / 4), static_cast<int>(index % 4)};
}

// Opaque to the compiler, which would rather compute such a value again for every tile than keep
// it.
template <typename T>
__device__ inline T kept(T x) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
  return x;
}

// The number of this warp, as fresh_lane.
__device__ inline int fresh_warp() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return static_cast<int>(thread / 32);
}

inline constexpr std::uint32_t kOnes = 0x3c003c00u;  // two fp16

// What a warp needs once a segment or group. In shared memory, since the registers are for the
// tiles and a spilled one would wait for memory behind all the tiles under way.
template <class S>
struct WarpState : WarpSegment {
  int last_tile;               // of a packed segment, the one behind it
  int2 seen;                   // tokens that no column sees others of
  int2 plain;                  // tiles of whose tokens all columns see the same ones
  std::uint32_t one;           // two fp16 ones, which the compiler does not know
  int zero;                    // nor does it know this
  float log_unit;              // log2 of what a score is multiplied by, without norm and U_s
  float sums[8 * S::kBlocks];  // 31 times the query's sum, in units of the mids' sums
  float center[S::kColumns];   // what the center adds to packed scores, in units of log2
};

// Of this warp.
template <class S>
__device__ inline char* warp_memory() {
  extern __shared__ __align__(128) char decode_memory[];
  return decode_memory + fresh_warp() * S::kWarpBytes;
}
template <class S>
__device__ inline WarpState<S>& warp_state(char* warp) {
  static_assert(S::kState + sizeof(WarpState<S>) <= S::kWarpBytes);
  return *reinterpret_cast<WarpState<S>*>(warp + S::kState);
}

// A partial result: [column][head_dim] sums, [column] max, [column] sum.
__device__ inline float* slot_of(const CudaAttendCall& call, const DecodePlan& plan, int slot) {
  return reinterpret_cast<float*>(call.workspace) +
         static_cast<std::int64_t>(slot) * plan.slot_floats;
}

// Where the result of the warp's segment of this kind goes.
template <class S>
__device__ inline float* partial_of(const CudaAttendCall& call, const DecodePlan& plan, char* warp,
                                    int kind) {
  const WarpState<S>& state = warp_state<S>(warp);
  if (state.next == state.last) return reinterpret_cast<float*>(warp);
  return slot_of(call, plan, 2 * state.item_index + kind);
}

// Query column of the item: its token in the sequence and its query head, or none.
struct DecodeColumn {
  int query;
  int q_head;
  bool used;
};
__device__ inline DecodeColumn column_of(const DecodePlan& plan, int kv_head, int queries,
                                         int first_column, int column) {
  const int at = first_column + column;
  const int query = plan.query_of(at);
  return {query, kv_head * plan.group + at - query * plan.group, query < queries};
}
__device__ inline DecodeColumn column_of(const DecodePlan& plan, const DecodeItem& item,
                                         int column) {
  return column_of(plan, item.kv_head, item.sequence.queries, item.first_column, column);
}

}  // namespace oscar::cuda
