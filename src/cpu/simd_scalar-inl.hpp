// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The vector vocabulary of the portable target: four lanes in the compiler's generic vectors, which
// every machine has (SSE2, NEON) or which become scalar code. The other targets offer the same
// names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/half.hpp"
#include "oscar/tensor.hpp"

namespace oscar::cpu {
namespace {

inline constexpr int kLanes = 4;
using Vf = float __attribute__((vector_size(16)));
using Vi = std::int32_t __attribute__((vector_size(16)));

inline Vf load(const float* source) {
  Vf v;
  std::memcpy(&v, source, sizeof v);
  return v;
}
inline void store(float* target, Vf v) { std::memcpy(target, &v, sizeof v); }
inline Vf splat(float x) { return Vf{x, x, x, x}; }

inline Vi load_int(const void* source) {
  Vi v;
  std::memcpy(&v, source, sizeof v);
  return v;
}
inline void store_int(void* target, Vi v) { std::memcpy(target, &v, sizeof v); }
inline Vi splat_int(std::int32_t x) { return Vi{x, x, x, x}; }
inline Vi load_u8(const std::uint8_t* p) { return Vi{p[0], p[1], p[2], p[3]}; }
inline Vi load_i8(const std::uint8_t* p) {
  const auto at = [p](int i) { return static_cast<std::int8_t>(p[i]); };
  return Vi{at(0), at(1), at(2), at(3)};
}
// Bit i: the top bit of byte i of 32. Eight bytes at a time, whose bits a product puts side by
// side.
inline std::uint32_t top_bits(const std::uint8_t* p) {
  std::uint32_t bits = 0;
  for (int i = 0; i < 32; i += 8) {
    std::uint64_t eight;
    std::memcpy(&eight, p + i, sizeof eight);
    eight = (eight >> 7 & 0x0101010101010101u) * 0x0102040810204080u >> 56;
    bits |= static_cast<std::uint32_t>(eight) << i;
  }
  return bits;
}
inline Vi add_int(Vi a, Vi b) { return a + b; }
inline Vi subtract_int(Vi a, Vi b) { return a - b; }
inline Vi shift_right(Vi v, int count) {
  using Vu = std::uint32_t __attribute__((vector_size(16)));
  return reinterpret_cast<Vi>(reinterpret_cast<Vu>(v) >> static_cast<std::uint32_t>(count));
}
inline Vi shift_left(Vi v, int count) { return v << count; }

inline Vf as_float(Vi v) { return reinterpret_cast<Vf>(v); }
inline Vi as_int(Vf v) { return reinterpret_cast<Vi>(v); }
inline Vf to_float(Vi v) { return __builtin_convertvector(v, Vf); }
// Rounds in the current mode (to even); |v| < 2^22, where the sum's last mantissa bit is the unit.
inline Vi to_int(Vf v) { return as_int(v + splat(0x1.8p23f)) - splat_int(0x4b400000); }

// The second operand where the first is NaN, as x86 does.
inline Vf min(Vf a, Vf b) { return a < b ? a : b; }
inline Vf max(Vf a, Vf b) { return a > b ? a : b; }
inline Vf abs(Vf v) { return as_float(as_int(v) & splat_int(0x7fffffff)); }
inline Vf multiply_add(Vf a, Vf b, Vf c) { return a * b + c; }
// a b + c rounded once, where the bytes depend on it.
inline Vf fused_multiply_add(Vf a, Vf b, Vf c) {
  Vf sum;
  for (int i = 0; i < kLanes; ++i) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sum;
}
// All bits where a > b, else none.
inline Vi where_greater(Vf a, Vf b) { return a > b; }
inline Vf zero_where_zero(Vi condition, Vf v) { return condition == 0 ? Vf{} : v; }

inline float reduce_add(Vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float reduce_max(Vf v) {
  const float a = v[0] > v[2] ? v[0] : v[2];
  const float b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}

// 2^n for an integral n in -127..127 (0 at -127).
inline Vf exp2_int(Vi n) {
  return as_float((n + 127) << 23);
}  // x minus the nearest integer; p times two to that integer (|x| < 127.5).
inline Vf minus_nearest(Vf x) { return x - to_float(to_int(x)); }
inline Vf times_exp2(Vf p, Vf x, Vf /*minus_nearest(x)*/) { return p * exp2_int(to_int(x)); }
// table[v % 8] 2^floor(v / 8): an index in eighths of an octave.
inline Vf exp2_eighths(Vi v, const float* table) {
  const Vf fraction{table[v[0] & 7], table[v[1] & 7], table[v[2] & 7], table[v[3] & 7]};
  return as_float(as_int(fraction) + ((v >> 3) << 23));
}

// The Hadamard levels at distances below kLanes.
inline Vf butterflies_in_lanes(Vf v) {
  v = Vf{v[0] + v[1], v[0] - v[1], v[2] + v[3], v[2] - v[3]};
  return Vf{v[0] + v[2], v[1] + v[3], v[0] - v[2], v[1] - v[3]};
}

inline void transpose(Vf (&rows)[kLanes]) {
  const Vf a = rows[0];
  const Vf b = rows[1];
  const Vf c = rows[2];
  const Vf d = rows[3];
  rows[0] = Vf{a[0], b[0], c[0], d[0]};
  rows[1] = Vf{a[1], b[1], c[1], d[1]};
  rows[2] = Vf{a[2], b[2], c[2], d[2]};
  rows[3] = Vf{a[3], b[3], c[3], d[3]};
}

inline float half_to_float(std::uint16_t bits) {
  return static_cast<float>(__builtin_bit_cast(Half, bits));
}
inline std::uint16_t float_to_half(float x) {
  return __builtin_bit_cast(std::uint16_t, static_cast<Half>(x));
}

inline Vf load_fp16(const std::byte* source) {
  std::uint16_t h[kLanes];
  std::memcpy(h, source, sizeof h);
  return Vf{half_to_float(h[0]), half_to_float(h[1]), half_to_float(h[2]), half_to_float(h[3])};
}
inline void store_fp16(std::byte* target, Vf v) {
  const std::uint16_t h[kLanes] = {float_to_half(v[0]), float_to_half(v[1]), float_to_half(v[2]),
                                   float_to_half(v[3])};
  std::memcpy(target, h, sizeof h);
}
inline Vf load_bf16(const std::byte* source) {
  std::uint16_t h[kLanes];
  std::memcpy(h, source, sizeof h);
  return as_float(Vi{h[0], h[1], h[2], h[3]} << 16);
}
// Round to nearest even; NaN stays NaN.
inline void store_bf16(std::byte* target, Vf v) {
  const Vi bits = as_int(v);
  const Vi rounded = bits + 0x7fff + (shift_right(bits, 16) & 1);
  const Vi out = shift_right(v == v ? rounded : (bits | 0x400000), 16);
  std::uint16_t h[kLanes];
  for (int i = 0; i < kLanes; ++i) h[i] = static_cast<std::uint16_t>(out[i]);
  std::memcpy(target, h, sizeof h);
}

}  // namespace
}  // namespace oscar::cpu
