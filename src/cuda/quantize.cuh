// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Scale and mid of a K channel and of a V token, and the code of a value. Compiled without fused
// multiply-add: the results are those of the CPU to the last bit.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/scale.cuh"
#include "oscar/format.hpp"

namespace oscar::cuda {

// The value that turns into a code: code = clamp(rint((value - mid) inverse + N / 2), 0, N).
struct Grid {
  float mid;
  float inverse;
};

// The step of a K channel's codes that span their share of its range over the tile.
template <int kBits>
__device__ inline float key_step(float low, float high, bool feedback) {
  constexpr auto kSteps = static_cast<float>(max_code(kBits));
  constexpr float kShares[2] = {k_range_share(kBits, false) / kSteps,
                                k_range_share(kBits, true) / kSteps};
  return (feedback ? kShares[1] : kShares[0]) * (high - low);
}
__device__ inline float middle(float low, float high) { return 0.5f * (high + low); }

// The unit of a parameter's indices, and its inverse as the divisions below want it.
struct Unit {
  float value;
  float inverse;  // to one last place
};

// 1 / x to the last bit, for x and 1 / x normal: what 1.0f / x computes without its special cases.
__device__ inline float reciprocal(float x) {
  float guess;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(x));
  return __fmaf_rn(guess, __fmaf_rn(-x, guess, 1.0f), guess);
}

// x / unit to the last bit, for a normal unit and a quotient of at most a few octaves.
__device__ inline float divide(float x, Unit unit) {
  const float guess = x * unit.inverse;
  const float better = __fmaf_rn(__fmaf_rn(-unit.value, guess, x), unit.inverse, guess);
  return __fmaf_rn(__fmaf_rn(-unit.value, better, x), unit.inverse, better);
}

__device__ inline float rounded_to_bf16(float x) {
  return __bfloat162float(__float2bfloat16_rn(x));
}

// From a maximum in bf16.
__device__ inline Unit unit_of(float maximum, int steps) {
  const float value = maximum / static_cast<float>(steps);
  return {value, reciprocal(value)};
}

// The largest scale and |mid| of a K tile's channels in bf16, and the units of the indices.
struct KeyTop {
  float max_scale;
  float max_mid;
  float scale_unit;
  Unit mid_unit;
};

// From the largest step and |mid| of its channels. A stored mid is off by half a unit at most, and
// the largest scale has room for that (key_params).
template <int kBits>
__device__ inline KeyTop key_top(float largest_step, float largest_mid) {
  constexpr float kMidShare = 1.0f / static_cast<float>(kMaxMidIndex * max_code(kBits));
  const float max_mid = rounded_to_bf16(largest_mid);
  const float max_scale = rounded_to_bf16(largest_step + max_mid * kMidShare);
  return {max_scale, max_mid, max_scale / static_cast<float>(kMaxScaleSteps),
          unit_of(max_mid, kMaxMidIndex)};
}

// Both maxima as the tile stores them: times its norms' power of two, bf16.
__device__ inline std::uint32_t unit_bits(const KeyTop& top, int largest_norm) {
  const float tile_norm =
      __uint_as_float(static_cast<std::uint32_t>(norm_octave(largest_norm) + 127) << 23);
  const __nv_bfloat162 units =
      __floats2bfloat162_rn(top.max_scale * tile_norm, top.max_mid * tile_norm);
  return reinterpret_cast<const std::uint32_t&>(units);
}

__device__ inline float clamped(float x, float low, float high) {
  return fminf(fmaxf(x, low), high);
}

// Parameter byte of a K channel, and the grid and the scale that the stored parameters stand for.
// The codes are to reach as far with the mid that is stored as they would have with the true one.
template <int kBits>
__device__ inline std::uint32_t key_params(float step, float mid, const KeyTop& top, Grid* grid,
                                           float* stored_scale) {
  constexpr float kMidError = 2.0f / static_cast<float>(max_code(kBits));
  const float i_m = top.mid_unit.value == 0.0f
                        ? 0.0f
                        : clamped(rintf(divide(mid, top.mid_unit)), -kMaxMidIndex, kMaxMidIndex);
  grid->mid = i_m * top.mid_unit.value;
  const float wanted = step + kMidError * fabsf(mid - grid->mid);
  constexpr float kBounds[] = {key_scale_bound(kBits, 0), key_scale_bound(kBits, 1),
                               key_scale_bound(kBits, 2)};
  constexpr int kSteps[] = {key_scale_steps(0), key_scale_steps(1), key_scale_steps(2),
                            key_scale_steps(3)};
  std::uint32_t i_s = 0;
  float stored = static_cast<float>(kSteps[0]) * top.scale_unit;
#pragma unroll
  for (int i = 0; i < kMaxScaleIndex; ++i) {
    if (wanted <= kBounds[i] * top.scale_unit) continue;
    i_s = static_cast<std::uint32_t>(i + 1);
    stored = static_cast<float>(kSteps[i + 1]) * top.scale_unit;
  }
  grid->inverse = stored == 0.0f ? 0.0f : reciprocal(stored);
  *stored_scale = stored;
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(i_m) + kMaxMidIndex) |
         i_s << kScaleShift;
}

struct ValueParams {
  int scale;  // u8
  int mid;    // i8
};

// A V token from its extremes over the channels.
template <int kBits>
__device__ inline ValueParams value_params(float low, float high, Grid* grid) {
  constexpr auto kSteps = static_cast<float>(max_code(kBits));
  constexpr float kShare = v_range_share(kBits) / kSteps;
  constexpr float kReach = 1.0f / (kMaxVMid * kVMidUnit + 0.5f * kSteps);
  const float mid = middle(low, high);
  const float wanted = kShare * (high - low);
  const float least = (fabsf(mid) + 0.5f * kSteps * wanted) * kReach;
  const int index = value_scale_index(fmaxf(wanted, least));
  grid->inverse = inverse_scale_of(index, kVScaleOffset);
  const float steps = clamped(rintf(mid * (64.0f * grid->inverse)), -kMaxVMid, kMaxVMid);
  grid->mid = steps * (scale_of(index, kVScaleOffset) * kVMidUnit);
  return {index, static_cast<int>(steps)};
}

// The fast way to a code: ((value - mid) / s + N / 2) / 2^bits, where the adder's saturation clamps
// at 0, plus a number whose low mantissa bits then are the rounded code. The powers of two are
// exact, so boundaries between codes stay where docs/format.md has them. One fused step replaces a
// product and a sum: the product's own rounding is 2^-24 of a step, below what the sum's rounding
// leaves.
template <int kBits>
inline constexpr float kCodeStep = 1.0f / static_cast<float>(1 << kBits);

template <int kBits>
inline constexpr std::uint32_t kCodeMagicBits =
    0x4b400000u - (static_cast<std::uint32_t>(kBits) << 23);  // 1.5 * 2^(23 - bits)

// stepped: a Grid with inverse / 2^bits.
template <int kBits>
__device__ inline std::uint32_t code_bits(float value, Grid stepped) {
  constexpr float kTop = max_code(kBits) * kCodeStep<kBits>;
  float x;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;"
      : "=f"(x)
      : "f"(value - stepped.mid), "f"(stepped.inverse), "f"(0.5f * kTop));
  return __float_as_uint(fminf(x, kTop) + __uint_as_float(kCodeMagicBits<kBits>));
}

// mid + scale (code - N / 2) - value, and code + kCodeMagicBits. stepped: as above, the scale times
// 2^bits. Each operation is one of docs/format.md's times a power of two: the same bits.
template <int kBits>
__device__ inline float negative_error(float value, Grid stepped, float scale,
                                       std::uint32_t* code) {
  constexpr float kTop = max_code(kBits) * kCodeStep<kBits>;
  const float magic = __uint_as_float(kCodeMagicBits<kBits>);
  const float x = __saturatef((value - stepped.mid) * stepped.inverse + 0.5f * kTop);
  const float rounded = fminf(x, kTop) + magic;
  *code = __float_as_uint(rounded);
  return stepped.mid + scale * (rounded - magic - 0.5f * kTop) - value;
}

// In the order of the format, for the path that is exact by construction.
template <int kBits>
__device__ inline std::uint32_t code_of(float value, Grid grid) {
  constexpr auto kSteps = static_cast<float>(max_code(kBits));
  return static_cast<std::uint32_t>(
      clamped(rintf((value - grid.mid) * grid.inverse + 0.5f * kSteps), 0.0f, kSteps));
}

}  // namespace oscar::cuda
