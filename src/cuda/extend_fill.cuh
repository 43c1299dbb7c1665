// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// A unit of tokens to fp16 MMA operands in shared memory, each element unpacked once for all rows
// of the block: K [unit tokens, head_dim] and V transposed [head_dim, unit tokens], both swizzled.
//
// Codes come out in the order of the byte pairs of a word, without any permutation:
//   * K: channels 4 i + 0, 2, 1, 3 within each four (Q is stored in the same order);
//   * tokens: column 4 Q + 0, 1, 2, 3 of a tile is position 4 Q + 0, 2, 1, 3 of K and V alike,
//     which is token Q, Q + 16, Q + 8, Q + 24.
#pragma once

#include "cuda/extend_query.cuh"
#include "cuda/mma.cuh"

namespace oscar::cuda {

// Token (0..31) of a column of a packed tile.
__device__ constexpr int token_of_column(int column) {
  return column / 4 + 16 * (column & 1) + 4 * (column & 2);
}

__device__ inline std::uint32_t as_bits(__half2 x) { return reinterpret_cast<std::uint32_t&>(x); }
__device__ inline __half2 as_half2(std::uint32_t x) { return reinterpret_cast<__half2&>(x); }

// Numbers of kBits bits at bit kShift of the low and the high half of w as the fp16 numbers
// 1024 + number 2^kShift.
template <int kBits, int kShift>
__device__ inline __half2 magic_of(std::uint32_t w) {
  constexpr std::uint32_t kMask = ((1u << kBits) - 1) * 0x00010001u << kShift;
  return as_half2((w & kMask) | 0x64006400u);
}

// The numbers themselves, exact in fp16, less kBias.
template <int kBits, int kShift, int kBias = 0>
__device__ inline __half2 codes_of(std::uint32_t w) {
  constexpr float kPlace = 1.0f / static_cast<float>(1 << kShift);
  return __hfma2(magic_of<kBits, kShift>(w), __float2half2_rn(kPlace),
                 __float2half2_rn(-1024.0f * kPlace - static_cast<float>(kBias)));
}

// U_s and U_m of a tile as multiples of a common unit, by which the norms are multiplied: U_s is
// the unit itself unless U_m is 2^10 times as large, and the codes times steps are whole numbers,
// exact in fp16.
struct OperandUnits {
  float unit;
  float scale;
  float mid;
};
__device__ inline OperandUnits operand_units(std::uint32_t bits) {
  const float scale = __uint_as_float(bits << 16) * (1.0f / kMaxScaleSteps);
  const float mid = __uint_as_float(bits & 0xffff0000u) * (1.0f / kMaxMidIndex);
  const float unit = fmaxf(fmaxf(scale, mid * 0x1p-10f), 1e-30f);
  const float inverse = __fdividef(1.0f, unit);
  return {unit, scale * inverse, mid * inverse};
}

// The tokens' parameters of one tile, made by one warp for itself.
struct TokenParameters {
  __half2 norm[kTileTokens];     // K norm times the unit of the tile, 2^-kKeyShift, by position
  __half v_scale[kTileTokens];   // V scale 2^-kValueShift, by column
  __half v_offset[kTileTokens];  // its value for code 0
};

__device__ inline float log_scale(int index, int bias) {
  const float x = static_cast<float>(index) * 0.125f - static_cast<float>(bias);
  return index == 0 ? 0.0f : exp2_fast(x);
}

// The parameter bytes of one position of a tile, and what they stand for.
struct TokenBytes {
  std::uint8_t norm;  // with a bit of the units
  std::uint8_t v_scale;
  std::int8_t v_mid;

  __device__ TokenBytes(const TileLayout& tile, const char* raw, int position)
      : norm(static_cast<std::uint8_t>(raw[tile.k_norms_offset() + position])),
        v_scale(static_cast<std::uint8_t>(raw[tile.v_scales_offset() + position])),
        v_mid(static_cast<std::int8_t>(raw[tile.v_mids_offset() + position])) {}

  // Of the tile, by a warp whose lane l has position l.
  [[nodiscard]] __device__ OperandUnits units() const {
    return operand_units(__ballot_sync(0xffffffffu, norm > kMaxNormIndex));
  }

  __device__ void store(float key_unit, float v_middle, int position, TokenParameters& to) const {
    const float scale = log_scale(v_scale, kVScaleBias + kValueShift);
    const int column = (position & ~3) + ((position & 1) << 1) + ((position & 2) >> 1);
    to.norm[position] =
        __float2half2_rn(log_scale(norm & kMaxNormIndex, kNormBias + kKeyShift) * key_unit);
    to.v_scale[column] = __float2half_rn(scale);
    to.v_offset[column] =
        __float2half_rn(scale * (static_cast<float>(v_mid) * kVMidUnit - v_middle));
  }
};

// What makes keys of the codes of eight channels, as the pairs (0, 2), (1, 3), (4, 6), (5, 7). A
// code is read as m = 1024 + place code (magic_of), and a key over its norm is
//   steps (code - N / 2) + U_m i_m = m scale + offset + rest,
// where m scale + offset is a multiple of a power of two that fp16 holds exactly (unless the mid is
// more than 1024 times the unit: then it is rounded, as the key will be) and the rest is added with
// the norm: the key is rounded once. Rounding U_m i_m - N / 2 steps to fp16 instead would be an
// error common to all tokens of a tile, which does not average out: it shifts their scores against
// those of other tiles.
template <int kBits>
struct ChannelParameters {
  __half2 scale[4];
  __half2 offset[4];
  __half2 rest[4];

  __device__ ChannelParameters(uint2 bytes, const OperandUnits& units) {
    constexpr float kMiddle = 0.5f * max_code(kBits);
    const __half2 mid_unit = __float2half2_rn(units.mid);
    const __half2 mid_unit_rest = __float2half2_rn(units.mid - __low2float(mid_unit));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float place = i < 2 ? 1.0f : static_cast<float>(1 << kBits);
      const std::uint32_t word = i < 2 ? bytes.x : bytes.y;
      scale[i] = __hmul2(steps_of(i % 2 == 0 ? word << 3 : word >> 5),
                         __float2half2_rn(units.scale / place));
      const __half2 mid = codes_of<6, 0, kMaxMidIndex>(i % 2 == 0 ? word : word >> 8);
      offset[i] =
          __hfma2(scale[i], __float2half2_rn(-1024.0f - kMiddle * place), __hmul2(mid, mid_unit));
      rest[i] = __hfma2(mid, mid_unit, __hneg2(taken(i, scale[i], offset[i])));
      rest[i] = __hfma2(mid, mid_unit_rest, rest[i]);
    }
  }

  // The steps of two channels whose scale indices are in bits 9 and 10 of the halves of w: the last
  // bit of fp16's exponent and the first one of its mantissa.
  __device__ static __half2 steps_of(std::uint32_t w) {
    return as_half2((w & 0x06000600u) | 0x40004000u);
  }

  // What of U_m i_m is in the offset, exactly; for pairs 0 and 1 the sum of 1024 and the middle is
  // not a number of fp16.
  __device__ static __half2 taken(int i, __half2 scale, __half2 offset) {
    constexpr float kMiddle = 0.5f * max_code(kBits);
    constexpr float kPlace = static_cast<float>(1 << kBits);
    if (i >= 2) return __hfma2(scale, __float2half2_rn(1024.0f + kMiddle * kPlace), offset);
    const __half2 zero = __hfma2(scale, __float2half2_rn(1024.0f), offset);
    return __hfma2(scale, __float2half2_rn(kMiddle), zero);
  }
};

__device__ inline void load_pairs(const void* shared, __half2 (&x)[4]) {
  const uint4 bits = *static_cast<const uint4*>(shared);
  x[0] = as_half2(bits.x);
  x[1] = as_half2(bits.y);
  x[2] = as_half2(bits.z);
  x[3] = as_half2(bits.w);
}

// Eight channels of the four tokens of position quad g, to four rows (from row0 on) of a panel of
// K. x: their words, shifted so that the first channel's code is in bit 0.
template <int kBits>
__device__ inline void unpack_key_quad(const std::uint32_t (&x)[4], const __half2 (&norm)[4],
                                       const ChannelParameters<kBits>& p, int row0, int chunk,
                                       char* panel) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    std::uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t pair = i % 2 == 0 ? x[j] : x[j] >> 8;
      const __half2 magic = i < 2 ? magic_of<kBits, 0>(pair) : magic_of<kBits, kBits>(pair);
      const __half2 exact = __hfma2(magic, p.scale[i], p.offset[i]);
      out[i] = as_bits(__hfma2(exact, norm[j], __hmul2(p.rest[i], norm[j])));
    }
    const int row = row0 + (j == 1 ? 2 : j == 2 ? 1 : j);
    *reinterpret_cast<uint4*>(panel + swizzled(row, chunk)) =
        make_uint4(out[0], out[1], out[2], out[3]);
  }
}

// Group kGroup of one column j of words: the eight tokens of an octet, one row of V^T.
template <int kBits, int kGroup>
__device__ inline void unpack_value_row(const std::uint32_t (&w)[2], const __half2 (&scale)[4],
                                        const __half2 (&offset)[4], char* target) {
  std::uint32_t out[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const std::uint32_t pair = q % 2 == 0 ? w[q / 2] : w[q / 2] >> 8;
    out[q] = as_bits(__hfma2(codes_of<kBits, kGroup * kBits>(pair), scale[q], offset[q]));
  }
  *reinterpret_cast<uint4*>(target) = make_uint4(out[0], out[1], out[2], out[3]);
}

// Which operands of a unit to make: both, or one after the other in the same place.
enum class Fill : std::uint8_t { kBoth, kKeys, kValues };
constexpr bool fills_keys(Fill fill) { return fill != Fill::kValues; }
constexpr bool fills_values(Fill fill) { return fill != Fill::kKeys; }

// A packed unit of one format by kThreads threads. Half of the warps take each tile; a thread has
// one chunk of eight channels of K, of kSteps position quads, and kColumns columns of V words.
// All reads of the tile come first: behind a write to shared memory the compiler must keep them.
template <int kPaddedDim, bool kFull, int kKeyBits, int kValueBits, int kThreads, Fill kFill>
__device__ inline void fill_format(int head_dim, const char* raw, int thread,
                                   TokenParameters* parameters, char* k_operand, char* v_operand) {
  const TileLayout tile{kFull ? kPaddedDim : head_dim, {kKeyBits, kValueBits}};
  constexpr int kTileThreads = kThreads / kUnitTiles;
  constexpr int kChunks = kPaddedDim / 8;
  constexpr int kSteps = 8 * kChunks / kTileThreads;
  constexpr int kOctets = 4 * 32 / kTileThreads;  // of eight tokens, a warp
  constexpr int kColumns = kOctets * kPaddedDim * kValueBits / 8 / 32;
  const int t = thread / kTileThreads;
  const int lane = thread % 32;
  const char* bytes = raw + t * tile.tile_bytes();
  const int index = thread % kTileThreads;
  const int chunk = index % 8 + index / 8 % (kChunks / 8) * 8;
  // Lines lie 512 bytes apart: neighbouring lines start at other quads, in other banks.
  const int g0 = kSteps * (index / kChunks) + 2 * (chunk / 2);
  const bool has_keys = fills_keys(kFill) && (kFull || 8 * chunk < head_dim);
  const int line = kKeyBits == 2 ? chunk / 2 : chunk;
  const TokenBytes token(tile, bytes, lane);
  const OperandUnits units = token.units();
  uint2 channels = make_uint2(0, 0);
  uint4 words[kSteps] = {};
  if (has_keys) {
    channels = *reinterpret_cast<const uint2*>(bytes + tile.k_params_offset() + 8 * chunk);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      words[i] = *reinterpret_cast<const uint4*>(bytes + (line * 8 + (g0 + i & 7)) * 16);
    }
  }
  const int stride = tile.v_group_channels();
  const int octet0 = thread / 32 % (kTileThreads / 32) * kOctets;
  const auto* codes = reinterpret_cast<const std::uint32_t*>(bytes + tile.v_codes_offset());
  std::uint32_t columns[kColumns][2] = {};
#pragma unroll
  for (int i = 0; i < kColumns && fills_values(kFill); ++i) {
    const int octet = octet0 + (lane + 32 * i) / stride;
    const int j = (lane + 32 * i) % stride;
    if (!kFull && octet >= octet0 + kOctets) continue;
    columns[i][0] = codes[2 * octet * stride + j];
    columns[i][1] = codes[(2 * octet + 1) * stride + j];
  }
  TokenParameters& own = parameters[thread / 32];
  __syncwarp();
  token.store(units.unit, 0.5f * max_code(kValueBits), lane, own);
  __syncwarp();
  const ChannelParameters<kKeyBits> p(channels, units);
  char* panel = k_operand + chunk / 8 * kUnitTokens * 128;
#pragma unroll
  for (int i = 0; i < kSteps && has_keys; ++i) {
    const int g = g0 + i & 7;
    __half2 norm[4];
    load_pairs(own.norm + 4 * g, norm);
    const int shift = kKeyBits == 2 ? 4 * (chunk & 1) : 0;
    const std::uint32_t x[4] = {words[i].x >> shift, words[i].y >> shift, words[i].z >> shift,
                                words[i].w >> shift};
    unpack_key_quad<kKeyBits>(x, norm, p, t * kTileTokens + 4 * g, chunk % 8, panel);
  }
#pragma unroll
  for (int i = 0; i < kColumns && fills_values(kFill); ++i) {
    const int octet = octet0 + (lane + 32 * i) / stride;
    const int j = (lane + 32 * i) % stride;
    if (!kFull && octet >= octet0 + kOctets) continue;
    __half2 scale[4], offset[4];
    load_pairs(own.v_scale + 8 * octet, scale);
    load_pairs(own.v_offset + 8 * octet, offset);
    // Where the groups are a multiple of 8 rows apart, the swizzle of all is that of the first.
    const auto target = [&](int group) {
      return v_operand + (kFull ? swizzled(j, 4 * t + octet) + group * stride * 128
                                : swizzled(j + group * stride, 4 * t + octet));
    };
    unpack_value_row<kValueBits, 0>(columns[i], scale, offset, target(0));
    unpack_value_row<kValueBits, 1>(columns[i], scale, offset, target(1));
    if constexpr (kValueBits == 2) {
      unpack_value_row<2, 2>(columns[i], scale, offset, target(2));
      unpack_value_row<2, 3>(columns[i], scale, offset, target(3));
    }
  }
}

// A packed unit. raw: its two tiles, one after the other; parameters: one a warp. The operands are
// complete after the next barrier.
template <int kPaddedDim, bool kFull, int kThreads, Fill kFill = Fill::kBoth>
__device__ inline void fill_packed(const Layout& layout, const char* raw, int thread,
                                   TokenParameters* parameters, char* k_operand, char* v_operand) {
  const int head_dim = layout.head_dim;
  if (layout.format == kK2V2) {
    fill_format<kPaddedDim, kFull, 2, 2, kThreads, kFill>(head_dim, raw, thread, parameters,
                                                          k_operand, v_operand);
  } else if (layout.format == kK4V2) {
    fill_format<kPaddedDim, kFull, 4, 2, kThreads, kFill>(head_dim, raw, thread, parameters,
                                                          k_operand, v_operand);
  } else {
    fill_format<kPaddedDim, kFull, 4, 4, kThreads, kFill>(head_dim, raw, thread, parameters,
                                                          k_operand, v_operand);
  }
}

// Where tile t of a packed unit lies, or null. A second tile that is not there is replaced by the
// first (its tokens are masked).
__device__ inline const std::uint8_t* unit_tile(const CudaAttendCall& call, const RowBlock& block,
                                                const Units& units, int unit, int t) {
  const int tile = max(min(units.first_tile(unit) + t, units.tile_end - 1), 0);
  return tile_address(call.layout, call.cache, block.b, block.kv_head, tile);
}

// All of them: read from the block table long before they are copied.
struct UnitTiles {
  const std::uint8_t* tile[kUnitTiles];

  __device__ UnitTiles(const CudaAttendCall& call, const RowBlock& block, const Units& units,
                       int unit) {
#pragma unroll
    for (int t = 0; t < kUnitTiles; ++t) tile[t] = unit_tile(call, block, units, unit, t);
  }
};

// Starts their copy to shared memory.
template <int kThreads>
__device__ inline void prefetch_packed(const UnitTiles& tiles, int bytes, int thread, char* raw) {
  const std::uint32_t target = shared_address(raw);
#pragma unroll
  for (int t = 0; t < kUnitTiles; ++t) {
    if (tiles.tile[t] == nullptr) continue;
    for (int i = 16 * thread; i < bytes; i += 16 * kThreads) {
      cp_async_16(target + t * bytes + i, tiles.tile[t] + i);
    }
  }
  cp_async_commit();
}

}  // namespace oscar::cuda
