// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
#include "reference/quantize.hpp"

#include <algorithm>
#include <cmath>

#include "core/rows.hpp"
#include "reference/scale.hpp"

namespace oscar::reference {
namespace {

struct Range {
  float mid;
  float span;
};

Range range_of(const float* values, int count, int stride) {
  float low = values[0];
  float high = values[0];
  for (int i = 1; i < count; ++i) {
    low = std::min(low, values[i * stride]);
    high = std::max(high, values[i * stride]);
  }
  return {0.5f * (high + low), high - low};
}

int rint_clamped(float x, int low, int high) {
  return static_cast<int>(
      std::clamp(std::rint(x), static_cast<float>(low), static_cast<float>(high)));
}

std::uint8_t code_of(float value, float mid, float inverse_scale, int bits) {
  const float middle = 0.5f * static_cast<float>(max_code(bits));
  return static_cast<std::uint8_t>(
      rint_clamped((value - mid) * inverse_scale + middle, 0, max_code(bits)));
}

// Channel c of `row` has become `code`: its error moves on to the channels behind it.
void carry_error(const std::uint16_t* feedback, int head_dim, int c, float value, float* row) {
  const float negative_error = value - row[c];
  for (int next = c + 1; next < head_dim; ++next) {
    row[next] = std::fma(negative_error, fp16_to_float(feedback[c * head_dim + next]), row[next]);
  }
}

float rounded_to_bf16(float x) { return bf16_to_float(float_to_bf16(x)); }

// Largest scale and |mid| that a tile can hold, in bf16, and the units of its indices.
struct KeyUnits {
  float max_scale;
  float max_mid;
  float scale;
  float mid;
};

// max_scale, max_mid: of the channels. Where a mid is rounded by half a unit the scale grows by
// what encode_channel adds, and the unit must allow for that.
KeyUnits key_units(int bits, float max_scale, float max_mid) {
  KeyUnits units{};
  units.max_mid = rounded_to_bf16(max_mid);
  const float room = 1.0f / static_cast<float>(kMaxMidIndex * max_code(bits));
  units.max_scale = rounded_to_bf16(max_scale + units.max_mid * room);
  units.scale = units.max_scale / static_cast<float>(kMaxScaleSteps);
  units.mid = units.max_mid / static_cast<float>(kMaxMidIndex);
  return units;
}

// What a tile stores of a channel, and what a reader makes of it.
struct KeyChannel {
  int scale_index;
  int mid_index;
  float scale;
  float mid;
};

// From the scale that the channel's range asks for, and its mid. The codes lie around the stored
// mid: to reach as far from the true one the scale is larger by 2 / N of the distance.
KeyChannel encode_channel(int bits, const KeyUnits& units, float scale, float mid) {
  KeyChannel channel{};
  channel.mid_index =
      units.mid == 0.0f ? 0 : rint_clamped(mid / units.mid, -kMaxMidIndex, kMaxMidIndex);
  channel.mid = static_cast<float>(channel.mid_index) * units.mid;
  const float wanted =
      scale + 2.0f / static_cast<float>(max_code(bits)) * std::abs(mid - channel.mid);
  for (int i = 0; i < kMaxScaleIndex; ++i) {
    channel.scale_index += wanted > key_scale_bound(bits, i) * units.scale ? 1 : 0;
  }
  channel.scale = static_cast<float>(key_scale_steps(channel.scale_index)) * units.scale;
  return channel;
}

// Rows become y / norm; returns 2^norm_octave, by which the stored norms are too small.
float divide_by_norms(int head_dim, float* y, Tile& tile) {
  std::uint8_t indices[kTileTokens];
  for (int t = 0; t < kTileTokens; ++t) {
    float* row = y + t * head_dim;
    indices[t] = norm_index(head_dim, row);
    const float inverse = inverse_norm_of(indices[t]);
    for (int c = 0; c < head_dim; ++c) row[c] *= inverse;
  }
  const int largest = *std::max_element(indices, indices + kTileTokens);
  for (int t = 0; t < kTileTokens; ++t) {
    tile.k_norms[t] = static_cast<std::uint8_t>(stored_norm(indices[t], largest));
  }
  return std::ldexp(1.0f, norm_octave(largest));
}

}  // namespace

void quantize_keys(const TileLayout& layout, float* y, Tile& tile, const std::uint16_t* feedback) {
  const int head_dim = layout.head_dim;
  const int bits = layout.format.k_bits;
  const float tile_norm = divide_by_norms(head_dim, y, tile);

  const float share = k_range_share(bits, feedback != nullptr) / static_cast<float>(max_code(bits));
  float scales[kMaxHeadDim];
  float mids[kMaxHeadDim];
  float max_scale = 0.0f;
  float max_mid = 0.0f;
  for (int c = 0; c < head_dim; ++c) {
    const Range range = range_of(y + c, kTileTokens, head_dim);
    scales[c] = share * range.span;
    mids[c] = range.mid;
    max_scale = std::max(max_scale, scales[c]);
    max_mid = std::max(max_mid, std::abs(mids[c]));
  }
  const KeyUnits units = key_units(bits, max_scale, max_mid);
  tile.k_max_scale = float_to_bf16(units.max_scale * tile_norm);
  tile.k_max_mid = float_to_bf16(units.max_mid * tile_norm);

  for (int c = 0; c < head_dim; ++c) {
    const KeyChannel channel = encode_channel(bits, units, scales[c], mids[c]);
    tile.k_scales[c] = static_cast<std::uint8_t>(channel.scale_index);
    tile.k_mids[c] = static_cast<std::int8_t>(channel.mid_index);
    // The codes follow the stored parameters, not the ones they were rounded from.
    const float scale = channel.scale;
    const float mid = channel.mid;
    const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    for (int t = 0; t < kTileTokens; ++t) {
      float* row = y + t * head_dim;
      const std::uint8_t code = code_of(row[c], mid, inverse, bits);
      tile.k_codes[t][c] = code;
      if (feedback == nullptr) continue;
      const float steps = static_cast<float>(code) - 0.5f * static_cast<float>(max_code(bits));
      carry_error(feedback, head_dim, c, mid + scale * steps, row);
    }
  }
}

void quantize_value(const TileLayout& layout, int token, const float* y, Tile& tile) {
  const int head_dim = layout.head_dim;
  const int bits = layout.format.v_bits;
  const auto steps = static_cast<float>(max_code(bits));
  const Range range = range_of(y, head_dim, 1);
  const float wanted = v_range_share(bits) / steps * range.span;
  // Large enough that mid, at most 127/64 scales, and the codes reach the far end together.
  const float reach = 1.0f / (kMaxVMid * kVMidUnit + 0.5f * steps);
  const float least = (std::abs(range.mid) + 0.5f * steps * wanted) * reach;

  const std::uint8_t index = value_scale_index(std::max(wanted, least));
  const float scale = value_scale_of(index);
  const float inverse = inverse_value_scale_of(index);
  const int mid_index = rint_clamped(range.mid * (64.0f * inverse), -kMaxVMid, kMaxVMid);
  const float mid = static_cast<float>(mid_index) * (scale * kVMidUnit);
  tile.v_scales[token] = index;
  tile.v_mids[token] = static_cast<std::int8_t>(mid_index);
  for (int c = 0; c < head_dim; ++c) tile.v_codes[token][c] = code_of(y[c], mid, inverse, bits);
}

}  // namespace oscar::reference
