// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// append for every head_dim and dtype: one block a tile and side, the 32 rows as floats in shared
// memory, the arithmetic of docs/format.md in its order, so the bytes are those of the CPU.
#pragma once

#include "cuda/page.cuh"
#include "cuda/quantize.cuh"
#include "cuda/rotate.cuh"
#include "cuda/scale.cuh"

namespace oscar::cuda {

inline constexpr int kPlainThreads = 128;
inline constexpr int kPlainParts = kPlainThreads / kTileTokens;  // threads that share a token

// Shared memory: rows [32][head_dim + 1], then a Grid a channel or token, a K scale a channel, and
// a float a warp.
struct PlainTile {
  float* rows;
  Grid* grids;
  float* scales;
  float* reduced;
  int head_dim;
  [[nodiscard]] __device__ float* row(int token) const { return rows + token * (head_dim + 1); }
};
__host__ __device__ constexpr int plain_shared_bytes(int head_dim) {
  return (kTileTokens * (head_dim + 1) + 3 * kMaxHeadDim + kPlainThreads / kWarp) * 4;
}

// 32 rows as the exact memory holds or will hold them, times their channel's factor.
__device__ inline void plain_load(const CudaAppendCall& call, const AppendSpan& span, Side side,
                                  int head, int tile, const PlainTile& to) {
  const int chunks = to.head_dim / kChunk;
  const float* balance = call.cache.balance == nullptr || side == Side::kValue
                             ? nullptr
                             : call.cache.balance + head * to.head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < kTileTokens * chunks; i += kPlainThreads) {
    const int token = tile * kTileTokens + i / chunks;
    const int channel = i % chunks * kChunk;
    const TokenRow row = token_row(call, span, side, head, token);
    float x[kChunk];
    load_chunk(row.data + channel * bytes_of(row.dtype), row.dtype, x);
    // What is in the ring has been through here before.
    const float limit = token < span.cached ? INFINITY : input_limit(row.dtype);
    bool bad = false;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      const float value = through(accepted(x[c], limit, &bad), call.layout.exact_dtype);
      const float sign = channel_sign(channel + c);
      const float factor = balance == nullptr ? sign : sign / balance[channel + c];
      to.row(i / chunks)[channel + c] = value * factor;
    }
    if (bad) report_fault(call.fault, side, head, span.first_row + token - span.cached);
  }
  __syncthreads();
}

// center: of the KV head, or null.
__device__ inline void plain_hadamard(const PlainTile& tile, const float* center) {
  const int block = hadamard_block(tile.head_dim);
  for (int distance = 1; distance < block; distance *= 2) {
    for (int i = static_cast<int>(threadIdx.x); i < kTileTokens * tile.head_dim / 2;
         i += kPlainThreads) {
      const int pair = i / kTileTokens;
      const int c = pair / distance * 2 * distance + pair % distance;
      float* row = tile.row(i % kTileTokens);
      const float a = row[c];
      const float b = row[c + distance];
      row[c] = a + b;
      row[c + distance] = a - b;
    }
    __syncthreads();
  }
  const float norm = hadamard_norm(block);
  for (int i = static_cast<int>(threadIdx.x); i < kTileTokens * tile.head_dim; i += kPlainThreads) {
    float& y = tile.row(i / tile.head_dim)[i % tile.head_dim];
    y *= norm;
    if (center != nullptr) y -= center[i % tile.head_dim];
  }
  __syncthreads();
}

// Rows become z = y / norm; returns the norm index of the thread's token. Four threads a token,
// four of the 16 lanes of the sum each; the lanes are added as the format says: l + 8, + 4, + 2,
// + 1.
__device__ inline int plain_norms(const PlainTile& tile) {
  const int token = static_cast<int>(threadIdx.x) / kPlainParts;
  const int part = static_cast<int>(threadIdx.x) % kPlainParts;
  float* row = tile.row(token);
  float lanes[4] = {};
  for (int c = 4 * part; c < tile.head_dim; c += 16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) lanes[i] += row[c + i] * row[c + i];
  }
#pragma unroll
  for (int distance = 2; distance > 0; distance /= 2) {
#pragma unroll
    for (float& lane : lanes) lane += __shfl_xor_sync(kAllLanes, lane, distance);
  }
  const float sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  const int index = norm_index(sum / static_cast<float>(tile.head_dim));
  const float inverse = inverse_scale_of(index, kTokenNormOffset);
  for (int c = part; c < tile.head_dim; c += kPlainParts) row[c] *= inverse;
  __syncthreads();
  return index;
}

__device__ inline float block_max(float value, const PlainTile& tile) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) tile.reduced[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < kPlainThreads / kWarp; ++warp) value = fmaxf(value, tile.reduced[warp]);
  return value;
}

// Rows become what is rounded: each channel's error is added to those behind it. Four threads a
// token; weights [head_dim][head_dim] fp16.
template <int kBits>
__device__ inline void plain_feedback(const std::uint16_t* weights, const PlainTile& tile) {
  float* row = tile.row(static_cast<int>(threadIdx.x) / kPlainParts);
  const int part = static_cast<int>(threadIdx.x) % kPlainParts;
  for (int c = 0; c < tile.head_dim; ++c) {
    const Grid stepped{tile.grids[c].mid, tile.grids[c].inverse * kCodeStep<kBits>};
    std::uint32_t code = 0;
    const float error =
        negative_error<kBits>(row[c], stepped, tile.scales[c] / kCodeStep<kBits>, &code);
    for (int later = c + 1 + part; later < tile.head_dim; later += kPlainParts) {
      const __half weight = __ushort_as_half(weights[c * tile.head_dim + later]);
      row[later] = __fmaf_rn(error, __half2float(weight), row[later]);
    }
    __syncwarp();
  }
  __syncthreads();
}

// Norm bytes with the units in them, and zeros up to the tile's end. norm: of the thread's token.
__device__ inline void plain_norm_bytes(const TileLayout& layout, const PlainTile& tile, int norm,
                                        const KeyTop& top, std::uint8_t* out) {
  const auto largest = static_cast<int>(block_max(static_cast<float>(norm), tile));
  const int position = position_of(static_cast<int>(threadIdx.x) / kPlainParts);
  if (threadIdx.x % kPlainParts == 0) {
    out[layout.k_norms_offset() + position] =
        norm_byte(norm, largest, unit_bits(top, largest), position);
  }
  for (int i = layout.used_bytes() + static_cast<int>(threadIdx.x); i < layout.tile_bytes();
       i += kPlainThreads) {
    out[i] = 0;
  }
}

// feedback: weights of this KV head, or null.
template <int kBits>
__device__ inline void plain_keys(const TileLayout& layout, const std::uint16_t* feedback,
                                  const PlainTile& tile, std::uint8_t* out) {
  const int norm = plain_norms(tile);
  float max_step = 0.0f;
  float max_mid = 0.0f;
  for (int c = static_cast<int>(threadIdx.x); c < tile.head_dim; c += kPlainThreads) {
    float low = tile.row(0)[c];
    float high = low;
    for (int token = 1; token < kTileTokens; ++token) {
      low = fminf(low, tile.row(token)[c]);
      high = fmaxf(high, tile.row(token)[c]);
    }
    tile.grids[c] = {middle(low, high), key_step<kBits>(low, high, feedback != nullptr)};
    max_step = fmaxf(max_step, tile.grids[c].inverse);
    max_mid = fmaxf(max_mid, fabsf(tile.grids[c].mid));
  }
  max_step = block_max(max_step, tile);
  const KeyTop top = key_top<kBits>(max_step, block_max(max_mid, tile));
  for (int c = static_cast<int>(threadIdx.x); c < tile.head_dim; c += kPlainThreads) {
    Grid& grid = tile.grids[c];  // so far: the wanted mid and the step
    out[layout.k_params_offset() + c] = static_cast<std::uint8_t>(
        key_params<kBits>(grid.inverse, grid.mid, top, &grid, &tile.scales[c]));
  }
  plain_norm_bytes(layout, tile, norm, top, out);
  __syncthreads();
  if (feedback != nullptr) plain_feedback<kBits>(feedback, tile);

  constexpr int kPerWord = 32 / kBits;
  const int words = tile.head_dim / kPerWord * kTileTokens;
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kPlainThreads) {
    const int channel = i / kTileTokens * kPerWord;
    const float* row = tile.row(token_at(i % kTileTokens)) + channel;
    std::uint32_t word = 0;
#pragma unroll
    for (int k = 0; k < kPerWord; ++k) {
      word |= code_of<kBits>(row[k], tile.grids[channel + k]) << (8 * (k % 4) + kBits * (k / 4));
    }
    reinterpret_cast<std::uint32_t*>(out + layout.k_codes_offset())[i] = word;
  }
}

template <int kBits>
__device__ inline void plain_values(const TileLayout& layout, const PlainTile& tile,
                                    std::uint8_t* out) {
  const int token = static_cast<int>(threadIdx.x) / kPlainParts;
  const int part = static_cast<int>(threadIdx.x) % kPlainParts;
  float low = tile.row(token)[part];
  float high = low;
  for (int c = part; c < tile.head_dim; c += kPlainParts) {
    low = fminf(low, tile.row(token)[c]);
    high = fmaxf(high, tile.row(token)[c]);
  }
#pragma unroll
  for (int distance = kPlainParts / 2; distance > 0; distance /= 2) {
    low = fminf(low, __shfl_xor_sync(kAllLanes, low, distance));
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, distance));
  }
  if (part == 0) {
    const ValueParams params = value_params<kBits>(low, high, &tile.grids[token]);
    out[layout.v_scales_offset() + position_of(token)] = static_cast<std::uint8_t>(params.scale);
    out[layout.v_mids_offset() + position_of(token)] = static_cast<std::uint8_t>(params.mid);
  }
  __syncthreads();

  constexpr int kGroups = 8 / kBits;
  const int group = tile.head_dim / kGroups;
  for (int i = static_cast<int>(threadIdx.x); i < kTileTokens / 4 * group; i += kPlainThreads) {
    std::uint32_t word = 0;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int at = i / group + 8 * b;
      const float* row = tile.row(at) + i % group;
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        word |= code_of<kBits>(row[k * group], tile.grids[at]) << (8 * b + kBits * k);
      }
    }
    reinterpret_cast<std::uint32_t*>(out + layout.v_codes_offset())[i] = word;
  }
}

// Grid (slots, kv_heads, 2 sides). The first block of a sequence reads the ring, so it is the one
// that writes it, afterwards.
__global__ void __launch_bounds__(kPlainThreads)
    append_plain_kernel(const __grid_constant__ CudaAppendCall call) {
  extern __shared__ float shared[];
  const Layout& layout = call.layout;
  const TileLayout tile_layout = layout.tile();
  float* const behind = shared + kTileTokens * (layout.head_dim + 1);
  const PlainTile tile{shared, reinterpret_cast<Grid*>(behind), behind + 2 * kMaxHeadDim,
                       behind + 3 * kMaxHeadDim, layout.head_dim};
  const int head = static_cast<int>(blockIdx.y);
  const auto side = static_cast<Side>(blockIdx.z);
  int first_slot = 0;
  int next_slot = 0;
  const int b = sequence_of_slot(call.batch, static_cast<int>(blockIdx.x), &first_slot, &next_slot);
  const AppendSpan span = append_span(call, b);
  const int nth = static_cast<int>(blockIdx.x) - first_slot;
  if (call.part != AppendPart::kRemember && nth < span.tiles()) {
    const int index = span.first_tile() + nth;
    std::uint8_t* out = tile_address(layout, call.cache, b, head, index);
    if (out != nullptr) {
      plain_load(call, span, side, head, index, tile);
      plain_hadamard(tile, side == Side::kKey ? head_center(layout, call.cache, head) : nullptr);
      const bool two_bits = (side == Side::kKey ? layout.format.k_bits : layout.format.v_bits) == 2;
      if (side == Side::kKey) {
        const std::uint16_t* feedback = head_feedback(layout, call.cache, head);
        two_bits ? plain_keys<2>(tile_layout, feedback, tile, out)
                 : plain_keys<4>(tile_layout, feedback, tile, out);
      } else {
        two_bits ? plain_values<2>(tile_layout, tile, out)
                 : plain_values<4>(tile_layout, tile, out);
      }
    }
  }
  if (call.part != AppendPart::kPack && nth == 0) {
    __syncthreads();
    remember(call, span, side, head, static_cast<int>(threadIdx.x), kPlainThreads);
  }
}

}  // namespace oscar::cuda
