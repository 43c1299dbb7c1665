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

// A K channel from its extremes over the tile.
template <int kBits>
__device__ inline float key_scale(float low, float high, bool feedback) {
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

// Both maxima as the tile stores them: times its norms' power of two, bf16.
__device__ inline std::uint32_t unit_bits(float max_scale, float max_mid, int largest_norm) {
  const float tile_norm =
      __uint_as_float(static_cast<std::uint32_t>(norm_octave(largest_norm) + 127) << 23);
  const __nv_bfloat162 units = __floats2bfloat162_rn(max_scale * tile_norm, max_mid * tile_norm);
  return reinterpret_cast<const std::uint32_t&>(units);
}

__device__ inline float clamped(float x, float low, float high) {
  return fminf(fmaxf(x, low), high);
}

// Parameter byte of a K channel, and the grid and the scale that the stored parameters stand for.
__device__ inline std::uint32_t key_params(float scale, float mid, Unit scale_unit, Unit mid_unit,
                                           Grid* grid, float* stored_scale) {
  const float i_s = scale_unit.value == 0.0f
                        ? 1.0f
                        : clamped(rintf(divide(scale, scale_unit)), 1.0f, kMaxScaleIndex);
  const float i_m = mid_unit.value == 0.0f
                        ? 0.0f
                        : clamped(rintf(divide(mid, mid_unit)), -kMaxMidIndex, kMaxMidIndex);
  const float stored = i_s * scale_unit.value;
  grid->mid = i_m * mid_unit.value;
  grid->inverse = stored == 0.0f ? 0.0f : reciprocal(stored);
  *stored_scale = stored;
  return static_cast<std::uint32_t>(i_s) |
         static_cast<std::uint32_t>(static_cast<std::int32_t>(i_m) + kMaxMidIndex) << 4;
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
