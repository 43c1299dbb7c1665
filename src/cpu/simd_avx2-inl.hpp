// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The vector vocabulary of AVX2 with FMA and F16C: see simd_scalar-inl.hpp for the meaning.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "oscar/tensor.hpp"

namespace oscar::cpu {
namespace {

inline constexpr int kLanes = 8;
using Vf = __m256;
using Vi = __m256i;

inline Vf load(const float* source) { return _mm256_loadu_ps(source); }
inline void store(float* target, Vf v) { _mm256_storeu_ps(target, v); }
inline Vf splat(float x) { return _mm256_set1_ps(x); }

inline Vi load_int(const void* source) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(source));
}
inline void store_int(void* target, Vi v) { _mm256_storeu_si256(static_cast<__m256i*>(target), v); }
inline Vi splat_int(std::int32_t x) { return _mm256_set1_epi32(x); }
inline Vi load_u8(const std::uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Vi load_i8(const std::uint8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline std::uint32_t top_bits(const std::uint8_t* p) {
  return static_cast<std::uint32_t>(
      _mm256_movemask_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline Vi add_int(Vi a, Vi b) { return _mm256_add_epi32(a, b); }
inline Vi subtract_int(Vi a, Vi b) { return _mm256_sub_epi32(a, b); }
inline Vi shift_right(Vi v, int count) { return _mm256_srli_epi32(v, count); }
inline Vi shift_left(Vi v, int count) { return _mm256_slli_epi32(v, count); }

inline Vf as_float(Vi v) { return _mm256_castsi256_ps(v); }
inline Vi as_int(Vf v) { return _mm256_castps_si256(v); }
inline Vf to_float(Vi v) { return _mm256_cvtepi32_ps(v); }
inline Vi to_int(Vf v) { return _mm256_cvtps_epi32(v); }

inline Vf min(Vf a, Vf b) { return _mm256_min_ps(a, b); }
inline Vf max(Vf a, Vf b) { return _mm256_max_ps(a, b); }
inline Vf abs(Vf v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
inline Vf multiply_add(Vf a, Vf b, Vf c) { return _mm256_fmadd_ps(a, b, c); }
inline Vf fused_multiply_add(Vf a, Vf b, Vf c) { return multiply_add(a, b, c); }
inline Vi where_greater(Vf a, Vf b) { return as_int(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline Vf zero_where_zero(Vi condition, Vf v) {
  return _mm256_andnot_ps(as_float(_mm256_cmpeq_epi32(condition, _mm256_setzero_si256())), v);
}

inline float reduce_add(Vf v) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float reduce_max(Vf v) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

inline Vf exp2_int(Vi n) {
  return as_float(_mm256_slli_epi32(_mm256_add_epi32(n, splat_int(127)), 23));
}
inline Vf minus_nearest(Vf x) { return x - to_float(to_int(x)); }
inline Vf times_exp2(Vf p, Vf x, Vf /*minus_nearest(x)*/) { return p * exp2_int(to_int(x)); }
inline Vf exp2_eighths(Vi v, const float* table) {
  const Vf fraction = _mm256_permutevar8x32_ps(load(table), v);  // reads the low three bits
  const Vi octaves = _mm256_slli_epi32(_mm256_srai_epi32(v, 3), 23);
  return as_float(_mm256_add_epi32(as_int(fraction), octaves));
}

inline Vf butterflies_in_lanes(Vf v) {
  Vf partner = _mm256_permute_ps(v, 0b10110001);
  v = _mm256_blend_ps(v + partner, partner - v, 0b10101010);
  partner = _mm256_permute_ps(v, 0b01001110);
  v = _mm256_blend_ps(v + partner, partner - v, 0b11001100);
  partner = _mm256_permute2f128_ps(v, v, 1);
  return _mm256_blend_ps(v + partner, partner - v, 0b11110000);
}

inline void transpose(Vf (&rows)[kLanes]) {
  Vf pairs[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  Vf quads[kLanes];
  for (int i = 0; i < kLanes; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

// For attend_int8-inl.hpp: bytes and 16-bit lanes.
inline constexpr int kBytes = 4 * kLanes;

inline Vi and_int(Vi a, Vi b) { return _mm256_and_si256(a, b); }
inline Vi splat_i8(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
inline Vi splat_i16(int x) { return _mm256_set1_epi16(static_cast<short>(x)); }
inline Vi add_i8(Vi a, Vi b) { return _mm256_add_epi8(a, b); }
inline Vi add_i16(Vi a, Vi b) { return _mm256_add_epi16(a, b); }
inline Vi multiply_i16(Vi a, Vi b) { return _mm256_mullo_epi16(a, b); }
template <int kCount>
inline Vi shift_right_u16(Vi v) {
  return _mm256_srli_epi16(v, kCount);
}
template <int kCount>
inline Vi shift_right_i16(Vi v) {
  return _mm256_srai_epi16(v, kCount);
}
// Within every 128 bits: bytes 0..7 and 8..15 to 16 bits, and 16 bits back to bytes.
inline Vi widen_low(Vi bytes) { return _mm256_unpacklo_epi8(bytes, _mm256_setzero_si256()); }
inline Vi widen_high(Vi bytes) { return _mm256_unpackhi_epi8(bytes, _mm256_setzero_si256()); }
inline Vi narrow_i8(Vi low, Vi high) { return _mm256_packs_epi16(low, high); }
inline Vi narrow_u8(Vi low, Vi high) { return _mm256_packus_epi16(low, high); }
// sum + pairs of products of 16-bit lanes.
inline Vi dot_i16(Vi sum, Vi a, Vi b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
// sum + groups of four products of an unsigned byte, at most 127, and a signed one.
inline Vi dot_bytes(Vi sum, Vi u, Vi s) {
  const Vi pairs = _mm256_maddubs_epi16(u, s);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, splat_i16(1)));
}
inline Vi splat_16_bytes(const void* source) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(source)));
}
// Byte i of every 128 bits: byte index[i] % 16 of the same 128 bits of the table (index < 128).
inline Vi shuffle_bytes(Vi table, Vi index) { return _mm256_shuffle_epi8(table, index); }
inline Vi splat_dword(const void* source) {
  std::int32_t dword;
  std::memcpy(&dword, source, sizeof dword);
  return splat_int(dword);
}
inline void store_i16(std::int16_t* target, Vi v) {
  const __m128i high = _mm256_extracti128_si256(v, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm_packs_epi32(_mm256_castsi256_si128(v), high));
}
using V4 = __m128;
inline V4 load4(const float* source) { return _mm_load_ps(source); }
inline void store4(float* target, V4 v) { _mm_store_ps(target, v); }
inline V4 splat4(float x) { return _mm_set1_ps(x); }
// The sums of four vectors.
inline V4 reduce_add_each(const Vf (&v)[4]) {
  const Vf four = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  return _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
}
inline void store_u8(std::uint8_t* target, Vi v) {
  const __m128i high = _mm256_extracti128_si256(v, 1);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_packus_epi16(words, words));
}

inline Vf load_fp16(const std::byte* source) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
inline void store_fp16(std::byte* target, Vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm256_cvtps_ph(v, _MM_FROUND_CUR_DIRECTION));
}
inline Vf load_bf16(const std::byte* source) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline void store_bf16(std::byte* target, Vf v) {
  const Vi bits = as_int(v);
  const Vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), splat_int(1));
  const Vi rounded = _mm256_add_epi32(_mm256_add_epi32(bits, splat_int(0x7fff)), odd);
  const Vi quiet = _mm256_or_si256(bits, splat_int(0x400000));
  const Vf nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const Vi out =
      _mm256_srli_epi32(as_int(_mm256_blendv_ps(as_float(rounded), as_float(quiet), nan)), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0b11011000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_castsi256_si128(packed));
}

}  // namespace
}  // namespace oscar::cpu
