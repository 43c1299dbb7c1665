// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Scale and mid of every K channel and V token, and what turns a value into its code:
// code = clamp(rint((value - mid) inverse + N / 2), 0, N).
#pragma once

#include "oscar/format.hpp"

namespace oscar::cpu {
namespace {

// As stored, and unpacked for pack.
struct KeyParams {
  alignas(64) float mids[kMaxHeadDim];
  alignas(64) float scales[kMaxHeadDim];
  alignas(64) float inverses[kMaxHeadDim];
  std::uint8_t bytes[kMaxHeadDim];
  float max_scale;  // in bf16
  float max_mid;
};
struct ValueParams {  // by position
  alignas(64) float mids[kTileTokens];
  alignas(64) float inverses[kTileTokens];
  std::uint8_t scale_bytes[kTileTokens];
  std::uint8_t mid_bytes[kTileTokens];
};

inline Vf clamp(Vf v, float low, float high) { return min(max(v, splat(low)), splat(high)); }

// Extremes of kLanes channels of `columns` over their 32 tokens, one channel a lane.
inline void channel_ranges(const float* columns, Vf& low, Vf& high) {
  Vf lows[kLanes];
  Vf highs[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const float* channel = columns + i * kTileTokens;
    lows[i] = highs[i] = load(channel);
    for (int t = kLanes; t < kTileTokens; t += kLanes) {
      const Vf z = load(channel + t);
      lows[i] = min(z, lows[i]);
      highs[i] = max(z, highs[i]);
    }
  }
  transpose(lows);
  transpose(highs);
  low = lows[0];
  high = highs[0];
  for (int i = 1; i < kLanes; ++i) {
    low = min(lows[i], low);
    high = max(highs[i], high);
  }
}

// Channels c .. c + kLanes - 1: the mids and the scales that their ranges ask for become what is
// stored. The codes lie around the stored mid: to reach as far from the true one the scale is
// larger by 2 / N of the distance, for which quantize_keys has left room.
template <int kBits>
inline void encode_channels(int c, float scale_unit, float mid_unit, KeyParams& params) {
  const Vf mid = load(params.mids + c);
  const Vf nearest = mid / splat(mid_unit == 0.0f ? 1.0f : mid_unit);
  const Vi i_m =
      mid_unit == 0.0f ? splat_int(0) : to_int(clamp(nearest, -kMaxMidIndex, kMaxMidIndex));
  const Vf stored_mid = to_float(i_m) * splat(mid_unit);
  const Vf more = splat(2.0f / static_cast<float>(max_code(kBits))) * abs(mid - stored_mid);
  const Vf wanted = load(params.scales + c) + more;
  Vi i_s = splat_int(0);
  Vi steps = splat_int(key_scale_steps(0));
#pragma GCC unroll 3
  for (int i = 0; i < kMaxScaleIndex; ++i) {
    const Vi above = where_greater(wanted, splat(key_scale_bound(kBits, i) * scale_unit));
    i_s = subtract_int(i_s, above);
    steps = add_int(steps, above & splat_int(key_scale_steps(i + 1) - key_scale_steps(i)));
  }
  const Vf stored_scale = to_float(steps) * splat(scale_unit);
  store(params.mids + c, stored_mid);
  store(params.scales + c, stored_scale);
  store(params.inverses + c, zero_where_zero(as_int(stored_scale), splat(1.0f) / stored_scale));
  alignas(64) std::int32_t bytes[kLanes];
  store_int(bytes, add_int(i_m, splat_int(kMaxMidIndex)) | shift_left(i_s, kScaleShift));
  for (int i = 0; i < kLanes; ++i) params.bytes[c + i] = static_cast<std::uint8_t>(bytes[i]);
}

// Parameters of z [head_dim][32 tokens].
template <int kBits>
inline void quantize_keys(const float* columns, int head_dim, bool feedback, KeyParams& params) {
  const float share = k_range_share(kBits, feedback) / static_cast<float>(max_code(kBits));
  Vf max_scale = splat(0.0f);
  Vf max_mid = splat(0.0f);
  for (int c = 0; c < head_dim; c += kLanes) {
    Vf low;
    Vf high;
    channel_ranges(columns + c * kTileTokens, low, high);
    const Vf scale = splat(share) * (high - low);
    const Vf mid = splat(0.5f) * (high + low);
    store(params.scales + c, scale);
    store(params.mids + c, mid);
    max_scale = max(scale, max_scale);
    max_mid = max(abs(mid), max_mid);
  }
  constexpr float kRoom = 1.0f / static_cast<float>(kMaxMidIndex * max_code(kBits));
  params.max_mid = bf16_value(bf16_bits(reduce_max(max_mid)));
  params.max_scale = bf16_value(bf16_bits(reduce_max(max_scale) + params.max_mid * kRoom));
  const float scale_unit = params.max_scale / static_cast<float>(kMaxScaleSteps);
  const float mid_unit = params.max_mid / static_cast<float>(kMaxMidIndex);
  for (int c = 0; c < head_dim; c += kLanes) {
    encode_channels<kBits>(c, scale_unit, mid_unit, params);
  }
}

// Parameters of 32 tokens from the extremes of each, by position.
template <int kBits>
inline void quantize_values(const float* lows, const float* highs, ValueParams& params) {
  constexpr float kSteps = static_cast<float>(max_code(kBits));
  constexpr float kShare = v_range_share(kBits) / kSteps;
  constexpr float kReach = 1.0f / (kMaxVMid * kVMidUnit + 0.5f * kSteps);
  for (int p = 0; p < kTileTokens; p += kLanes) {
    const Vf low = load(lows + p);
    const Vf high = load(highs + p);
    const Vf mid = splat(0.5f) * (high + low);
    const Vf wanted = splat(kShare) * (high - low);
    const Vf least = (abs(mid) + splat(0.5f * kSteps) * wanted) * splat(kReach);
    alignas(64) float scales[kLanes];
    store(scales, max(wanted, least));
    for (int i = 0; i < kLanes; ++i) {
      params.scale_bytes[p + i] = log2_index(scales[i], kSixteenthBounds, kVScaleOffset);
    }
    const Vi u = load_u8(params.scale_bytes + p);
    const Vf inverse = inverse_scale_of(u, kVScaleOffset);
    const Vf steps = mid * (splat(64.0f) * inverse);
    const Vi index = to_int(clamp(steps, -kMaxVMid, kMaxVMid));
    store(params.mids + p, to_float(index) * (scale_of(u, kVScaleOffset) * splat(kVMidUnit)));
    store(params.inverses + p, inverse);
    alignas(64) std::int32_t indices[kLanes];
    store_int(indices, index);
    for (int i = 0; i < kLanes; ++i)
      params.mid_bytes[p + i] = static_cast<std::uint8_t>(indices[i]);
  }
}

template <int kBits>
inline Vi code_of(Vf value, Vf mid, Vf inverse) {
  constexpr auto kSteps = static_cast<float>(max_code(kBits));
  return to_int(clamp((value - mid) * inverse + splat(0.5f * kSteps), 0.0f, kSteps));
}

}  // namespace
}  // namespace oscar::cpu
