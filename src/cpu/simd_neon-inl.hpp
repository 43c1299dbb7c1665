// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The vector vocabulary of arm64 NEON: see simd_scalar-inl.hpp for the meaning.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "oscar/tensor.hpp"

namespace oscar::cpu {
namespace {

inline constexpr int kLanes = 4;
using Vf = float32x4_t;
using Vi = int32x4_t;

inline Vf load(const float* source) { return vld1q_f32(source); }
inline void store(float* target, Vf v) { vst1q_f32(target, v); }
inline Vf splat(float x) { return vdupq_n_f32(x); }

// By bytes, since codes are not aligned to words for the language.
inline Vi load_int(const void* source) {
  return vreinterpretq_s32_u8(vld1q_u8(static_cast<const std::uint8_t*>(source)));
}
inline void store_int(void* target, Vi v) {
  vst1q_u8(static_cast<std::uint8_t*>(target), vreinterpretq_u8_s32(v));
}
inline Vi splat_int(std::int32_t x) { return vdupq_n_s32(x); }
inline uint8x8_t load_four_bytes(const std::uint8_t* p) {
  std::uint32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return vreinterpret_u8_u32(vdup_n_u32(bytes));
}
inline Vi load_u8(const std::uint8_t* p) {
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load_four_bytes(p)))));
}
inline Vi load_i8(const std::uint8_t* p) {
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_four_bytes(p)))));
}
// Each byte's bit at its place among eight bytes, then sums of eight.
inline std::uint32_t top_bits(const std::uint8_t* p) {
  const uint8x16_t place = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
  const auto placed = [&](const std::uint8_t* bytes) {
    return vandq_u8(vcltzq_s8(vreinterpretq_s8_u8(vld1q_u8(bytes))), place);
  };
  uint8x16_t sums = vpaddq_u8(placed(p), placed(p + 16));
  sums = vpaddq_u8(sums, sums);
  sums = vpaddq_u8(sums, sums);
  return vgetq_lane_u32(vreinterpretq_u32_u8(sums), 0);
}
inline Vi add_int(Vi a, Vi b) { return vaddq_s32(a, b); }
inline Vi subtract_int(Vi a, Vi b) { return vsubq_s32(a, b); }
inline Vi shift_right(Vi v, int count) {
  return vreinterpretq_s32_u32(vreinterpretq_u32_s32(v) >> static_cast<std::uint32_t>(count));
}
inline Vi shift_left(Vi v, int count) { return v << count; }

inline Vf as_float(Vi v) { return vreinterpretq_f32_s32(v); }
inline Vi as_int(Vf v) { return vreinterpretq_s32_f32(v); }
inline Vf to_float(Vi v) { return vcvtq_f32_s32(v); }
inline Vi to_int(Vf v) { return vcvtnq_s32_f32(v); }  // 0 for NaN

// Compared and selected: FMIN and FMAX return NaN for a NaN in either operand, FMINNM and FMAXNM
// for none, x86 for one in the second.
inline Vf min(Vf a, Vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline Vf max(Vf a, Vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Vf abs(Vf v) { return vabsq_f32(v); }
inline Vf multiply_add(Vf a, Vf b, Vf c) { return vfmaq_f32(c, a, b); }
inline Vf fused_multiply_add(Vf a, Vf b, Vf c) { return multiply_add(a, b, c); }
inline Vi where_greater(Vf a, Vf b) { return vreinterpretq_s32_u32(vcgtq_f32(a, b)); }
inline Vf zero_where_zero(Vi condition, Vf v) {
  return as_float(vandq_s32(vreinterpretq_s32_u32(vtstq_s32(condition, condition)), as_int(v)));
}

inline float reduce_add(Vf v) { return vaddvq_f32(v); }
inline float reduce_max(Vf v) { return vmaxvq_f32(v); }

inline Vf exp2_int(Vi n) { return as_float(vshlq_n_s32(vaddq_s32(n, splat_int(127)), 23)); }
inline Vf minus_nearest(Vf x) { return x - to_float(to_int(x)); }
inline Vf times_exp2(Vf p, Vf x, Vf /*minus_nearest(x)*/) { return p * exp2_int(to_int(x)); }
inline Vf exp2_eighths(Vi v, const float* table) {
  const uint8x16x2_t eight = {vreinterpretq_u8_f32(load(table)),
                              vreinterpretq_u8_f32(load(table + 4))};
  // Bytes 4 i .. 4 i + 3 of the table for lane value i.
  const Vi bytes = vmlaq_s32(splat_int(0x03020100), v & splat_int(7), splat_int(0x04040404));
  const Vi fraction = vreinterpretq_s32_u8(vqtbl2q_u8(eight, vreinterpretq_u8_s32(bytes)));
  return as_float(vaddq_s32(fraction, vshlq_n_s32(vshrq_n_s32(v, 3), 23)));
}

// Lanes 0 and 1 of a, then of b.
inline Vf low_halves(Vf a, Vf b) {
  return vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
inline Vf high_halves(Vf a, Vf b) {
  return vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}

inline Vf butterflies_in_lanes(Vf v) {
  Vf partner = vrev64q_f32(v);
  v = vtrn1q_f32(v + partner, v - partner);
  partner = vextq_f32(v, v, 2);
  return low_halves(v + partner, v - partner);
}

inline void transpose(Vf (&rows)[kLanes]) {
  const Vf even_ab = vtrn1q_f32(rows[0], rows[1]);
  const Vf odd_ab = vtrn2q_f32(rows[0], rows[1]);
  const Vf even_cd = vtrn1q_f32(rows[2], rows[3]);
  const Vf odd_cd = vtrn2q_f32(rows[2], rows[3]);
  rows[0] = low_halves(even_ab, even_cd);
  rows[1] = low_halves(odd_ab, odd_cd);
  rows[2] = high_halves(even_ab, even_cd);
  rows[3] = high_halves(odd_ab, odd_cd);
}

inline Vf load_fp16(const std::byte* source) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(reinterpret_cast<const std::uint8_t*>(source))));
}
inline void store_fp16(std::byte* target, Vf v) {
  vst1_u8(reinterpret_cast<std::uint8_t*>(target), vreinterpret_u8_f16(vcvt_f16_f32(v)));
}

inline Vf load_bf16(const std::byte* source) {
  const uint16x4_t h = vreinterpret_u16_u8(vld1_u8(reinterpret_cast<const std::uint8_t*>(source)));
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(h), 16));
}
inline void store_bf16(std::byte* target, Vf v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint32x4_t out = vbslq_u32(vceqq_f32(v, v), rounded, quiet);
  vst1_u8(reinterpret_cast<std::uint8_t*>(target), vreinterpret_u8_u16(vshrn_n_u32(out, 16)));
}

}  // namespace
}  // namespace oscar::cpu
