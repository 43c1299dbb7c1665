// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The vector vocabulary of AVX-512 (F, BW, DQ, VL): see simd_scalar-inl.hpp for the meaning.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "oscar/tensor.hpp"

namespace oscar::cpu {
namespace {

inline constexpr int kLanes = 16;
using Vf = __m512;
using Vi = __m512i;

inline Vf load(const float* source) { return _mm512_loadu_ps(source); }
inline void store(float* target, Vf v) { _mm512_storeu_ps(target, v); }
inline Vf splat(float x) { return _mm512_set1_ps(x); }

inline Vi load_int(const void* source) { return _mm512_loadu_si512(source); }
inline void store_int(void* target, Vi v) { _mm512_storeu_si512(target, v); }
inline Vi splat_int(std::int32_t x) { return _mm512_set1_epi32(x); }
inline Vi load_u8(const std::uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vi load_i8(const std::uint8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline std::uint32_t top_bits(const std::uint8_t* p) {
  return _mm256_movepi8_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vi add_int(Vi a, Vi b) { return _mm512_add_epi32(a, b); }
inline Vi subtract_int(Vi a, Vi b) { return _mm512_sub_epi32(a, b); }
inline Vi shift_right(Vi v, int count) {
  return _mm512_srli_epi32(v, static_cast<unsigned int>(count));
}
inline Vi shift_left(Vi v, int count) {
  return _mm512_slli_epi32(v, static_cast<unsigned int>(count));
}

inline Vf as_float(Vi v) { return _mm512_castsi512_ps(v); }
inline Vi as_int(Vf v) { return _mm512_castps_si512(v); }
inline Vf to_float(Vi v) { return _mm512_cvtepi32_ps(v); }
inline Vi to_int(Vf v) { return _mm512_cvtps_epi32(v); }

inline Vf min(Vf a, Vf b) { return _mm512_min_ps(a, b); }
inline Vf max(Vf a, Vf b) { return _mm512_max_ps(a, b); }
inline Vf abs(Vf v) { return _mm512_abs_ps(v); }
inline Vf multiply_add(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }
inline Vf fused_multiply_add(Vf a, Vf b, Vf c) { return multiply_add(a, b, c); }
inline Vi where_greater(Vf a, Vf b) {
  return _mm512_movm_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ));
}
inline Vf zero_where_zero(Vi condition, Vf v) {
  return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(condition, condition), v);
}

inline float reduce_add(Vf v) { return _mm512_reduce_add_ps(v); }
inline float reduce_max(Vf v) { return _mm512_reduce_max_ps(v); }

inline Vf exp2_int(Vi n) {
  return as_float(_mm512_slli_epi32(_mm512_add_epi32(n, splat_int(127)), 23));
}
inline Vf minus_nearest(Vf x) { return _mm512_reduce_ps(x, 0); }
inline Vf times_exp2(Vf p, Vf x, Vf fraction) { return _mm512_scalef_ps(p, x - fraction); }
inline Vf exp2_eighths(Vi v, const float* table) {
  const Vf eight = _mm512_broadcast_f32x8(_mm256_loadu_ps(table));
  const Vf fraction = _mm512_permutexvar_ps(v, eight);  // reads the low four bits
  const Vi octaves = _mm512_slli_epi32(_mm512_srai_epi32(v, 3), 23);
  return as_float(_mm512_add_epi32(as_int(fraction), octaves));
}

inline Vf butterflies_in_lanes(Vf v) {
  Vf partner = _mm512_permute_ps(v, 0b10110001);
  v = _mm512_mask_sub_ps(v + partner, 0xaaaa, partner, v);
  partner = _mm512_permute_ps(v, 0b01001110);
  v = _mm512_mask_sub_ps(v + partner, 0xcccc, partner, v);
  partner = _mm512_shuffle_f32x4(v, v, 0b10110001);
  v = _mm512_mask_sub_ps(v + partner, 0xf0f0, partner, v);
  partner = _mm512_shuffle_f32x4(v, v, 0b01001110);
  return _mm512_mask_sub_ps(v + partner, 0xff00, partner, v);
}

inline void transpose(Vf (&rows)[kLanes]) {
  Vf pairs[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  Vf quads[kLanes];  // 4 i + j: rows 4 i .. 4 i + 3, columns j, j + 4, j + 8, j + 12
  for (int i = 0; i < kLanes; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    const Vf even_low = _mm512_shuffle_f32x4(quads[j], quads[j + 4], 0x88);
    const Vf even_high = _mm512_shuffle_f32x4(quads[j + 8], quads[j + 12], 0x88);
    const Vf odd_low = _mm512_shuffle_f32x4(quads[j], quads[j + 4], 0xdd);
    const Vf odd_high = _mm512_shuffle_f32x4(quads[j + 8], quads[j + 12], 0xdd);
    rows[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    rows[j + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    rows[j + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    rows[j + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

// For attend_int8-inl.hpp: bytes and 16-bit lanes.
inline constexpr int kBytes = 4 * kLanes;

inline Vi and_int(Vi a, Vi b) { return _mm512_and_si512(a, b); }
inline Vi splat_i8(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
inline Vi splat_i16(int x) { return _mm512_set1_epi16(static_cast<short>(x)); }
inline Vi add_i8(Vi a, Vi b) { return _mm512_add_epi8(a, b); }
inline Vi add_i16(Vi a, Vi b) { return _mm512_add_epi16(a, b); }
inline Vi multiply_i16(Vi a, Vi b) { return _mm512_mullo_epi16(a, b); }
template <int kCount>
inline Vi shift_right_u16(Vi v) {
  return _mm512_srli_epi16(v, kCount);
}
template <int kCount>
inline Vi shift_right_i16(Vi v) {
  return _mm512_srai_epi16(v, kCount);
}
// Within every 128 bits: bytes 0..7 and 8..15 to 16 bits, and 16 bits back to bytes.
inline Vi widen_low(Vi bytes) { return _mm512_unpacklo_epi8(bytes, _mm512_setzero_si512()); }
inline Vi widen_high(Vi bytes) { return _mm512_unpackhi_epi8(bytes, _mm512_setzero_si512()); }
inline Vi narrow_i8(Vi low, Vi high) { return _mm512_packs_epi16(low, high); }
inline Vi narrow_u8(Vi low, Vi high) { return _mm512_packus_epi16(low, high); }
// sum + pairs of products of 16-bit lanes.
inline Vi dot_i16(Vi sum, Vi a, Vi b) { return _mm512_dpwssd_epi32(sum, a, b); }
// sum + groups of four products of an unsigned byte, at most 127, and a signed one.
inline Vi dot_bytes(Vi sum, Vi u, Vi s) { return _mm512_dpbusd_epi32(sum, u, s); }
inline Vi splat_16_bytes(const void* source) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(source)));
}
// Byte i of every 128 bits: byte index[i] % 16 of the same 128 bits of the table (index < 128).
inline Vi shuffle_bytes(Vi table, Vi index) { return _mm512_shuffle_epi8(table, index); }
inline Vi splat_dword(const void* source) {
  std::int32_t dword;
  std::memcpy(&dword, source, sizeof dword);
  return splat_int(dword);
}
inline void store_i16(std::int16_t* target, Vi v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtsepi32_epi16(v));
}
using V4 = __m128;
inline V4 load4(const float* source) { return _mm_load_ps(source); }
inline void store4(float* target, V4 v) { _mm_store_ps(target, v); }
inline V4 splat4(float x) { return _mm_set1_ps(x); }
// The sums of four vectors.
inline V4 reduce_add_each(const Vf (&v)[4]) {
  const Vf ab = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
  const Vf cd = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
  const Vf four = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const __m256 half = _mm512_castps512_ps256(four) + _mm512_extractf32x8_ps(four, 1);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline void store_u8(std::uint8_t* target, Vi v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtusepi32_epi8(v));
}

inline Vf load_fp16(const std::byte* source) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
inline void store_fp16(std::byte* target, Vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_cvtps_ph(v, _MM_FROUND_CUR_DIRECTION));
}
inline Vf load_bf16(const std::byte* source) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline void store_bf16(std::byte* target, Vf v) {
  const Vi bits = as_int(v);
  const Vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), splat_int(1));
  const Vi rounded = _mm512_add_epi32(_mm512_add_epi32(bits, splat_int(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const Vi out = _mm512_mask_or_epi32(rounded, nan, bits, splat_int(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16)));
}

}  // namespace
}  // namespace oscar::cpu
