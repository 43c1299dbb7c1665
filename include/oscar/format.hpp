// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The packed tile: 32 consecutive tokens of one KV head, K and V, as bytes. This file is the only
// definition of the layout; every backend and the documentation (docs/format.md) follow it.
//
//   offset                 section                        bytes (head_dim 128, k2v2)
//   k_codes_offset()       K codes                        1024
//   v_codes_offset()       V codes                        1024
//   k_params_offset()      K scale and mid, a channel      128   (i_m + 31) | i_s << 6
//   v_scales_offset()      V scale, a position              32   u8, 2^(u/8 - 16); 0: scale 0
//   v_mids_offset()        V mid, a position                32   i8, in units of scale / 64
//   k_norms_offset()       K norm, a position               32   u | unit bit << 7,
//                                                                2^(u/8 - 16); u = 0: norm 0
//   used_bytes()                                          2272
//   tile_bytes()           rounded up with zeros          2304   to tile_alignment(): 64
//
// K units: the top bits of the 32 norm bytes are one word of 32 bits, bit p that of position p:
// bf16(max scale) | bf16(max |mid|) << 16, with U_s = max / 6, U_m = max / 31. A vector unit reads
// it with one mask of byte signs, a warp with one ballot. Norms are relative to the tile's largest,
// which is at least 1/2: its power of two is in the units, so seven bits are enough.
//
// K scale: i_s = 0..3 stands for 2, 3, 4 or 6 U_s (key_scale_steps): half octaves, nearly, and as
// one bit of exponent and one of mantissa they are a float with one shift and one mask.
//
// Position: token t of a tile (0..31) stands at position 4 (t % 8) + t / 8. Arrays "a position"
// and the 32-bit words of a K line are in position order, so a CPU vector of scores, the p bytes
// of a V quad and the four tokens of a GPU thread are contiguous.
//
// K codes, 2 bits: 32-bit word [line L = c / 16][position], one token x 16 channels; byte b, bit
// pair i of the word holds channel 16 L + 4 i + b:
//     bits  31..30 29..28 27..26 25..24 | .. | 7..6  5..4  3..2  1..0
//     chan   +15    +11    +7     +3    | .. | +12    +8    +4    +0
// K codes, 4 bits: word [line L = c / 8][position]; byte b, nibble i holds channel 8 L + 4 i + b.
//
// V codes, 2 bits: word [quad Q = 0..7][channel j = 0..D/4-1], four tokens x 4 channels; byte b is
// the token at position 4 Q + b (token Q + 8 b), bit pair i is channel i D/4 + j.
// V codes, 4 bits: word [Q][j = 0..D/2-1]; nibble i is channel i D/2 + j.
//
// Dequantised values (N = 2^bits - 1), in the rotated basis:
//   k = norm (U_m i_m + U_s key_scale_steps(i_s) (code - N / 2)) + center,
//   v = scale (mid / 64 + code - N / 2).
#pragma once

#include <cstddef>
#include <cstdint>

namespace oscar {

// Of the bytes of a tile. Version 1 (up to oscar-kv 0.1) had four bits of mid and four of scale.
inline constexpr int kFormatVersion = 2;
inline constexpr int kTileTokens = 32;
inline constexpr int kMinHeadDim = 32;
inline constexpr int kMaxHeadDim = 256;
inline constexpr int kHeadDimStep = 16;
inline constexpr int kNormBias = 16;  // K norm, 7 bits -> 2^(u/8 - 16)
inline constexpr int kMaxNormIndex = 127;
inline constexpr int kTokenNormBias = 20;  // before a tile's power of two is taken out, 8 bits
inline constexpr int kVScaleBias = 16;     // V scale u8 -> 2^(u/8 - 16)
inline constexpr int kMaxScaleIndex = 3;
inline constexpr int kMaxScaleSteps = 6;
inline constexpr int kMaxMidIndex = 31;
inline constexpr int kScaleShift = 6;  // of the scale index in a K parameter byte
inline constexpr int kMaxVMid = 127;
inline constexpr float kVMidUnit = 1.0f / 64.0f;
inline constexpr float kMaxBalance = 64.0f;   // and its inverse
inline constexpr float kMaxInput = 65504.0f;  // largest |k| or |v| that append accepts (fp16 max)

struct Format {
  int k_bits = 2;
  int v_bits = 2;
  friend constexpr bool operator==(Format, Format) = default;
};

inline constexpr Format kK2V2{2, 2};
inline constexpr Format kK4V2{4, 2};
inline constexpr Format kK4V4{4, 4};
inline constexpr Format kFormats[] = {kK2V2, kK4V2, kK4V4};

constexpr const char* name_of(Format format) {
  return format == kK2V2 ? "k2v2" : format == kK4V2 ? "k4v2" : format == kK4V4 ? "k4v4" : "unknown";
}

constexpr bool is_format(Format format) {
  return format == kK2V2 || format == kK4V2 || format == kK4V4;
}

constexpr bool is_head_dim(int head_dim) {
  return head_dim >= kMinHeadDim && head_dim <= kMaxHeadDim && head_dim % kHeadDimStep == 0;
}

// Largest power of two that divides head_dim: the Hadamard block.
constexpr int hadamard_block(int head_dim) { return head_dim & -head_dim; }

constexpr int max_code(int bits) { return (1 << bits) - 1; }

// Share of the (max - min) range that the codes span; notes on the choice in docs/format.md.
// With error feedback a clipped value is passed on like any other error: clipping less is better.
constexpr float k_range_share(int bits, bool feedback) {
  return bits == 2 ? (feedback ? 0.94f : 0.88f) : 1.0f;
}
constexpr float v_range_share(int bits) { return bits == 2 ? 0.82f : 1.0f; }

// What a K channel's scale index stands for, in units U_s: 2, 3, 4, 6.
constexpr int key_scale_steps(int index) { return (2 + (index & 1)) << (index >> 1); }
// The scale index is the number of these bounds, of index 0 to 2, times U_s, that the wanted scale
// exceeds: halfway between two steps for 2-bit codes, a quarter for 4-bit ones. Rounded down, a
// scale clips the ends of a channel, which 4-bit codes would resolve.
constexpr float key_scale_bound(int bits, int index) {
  const auto low = static_cast<float>(key_scale_steps(index));
  const auto high = static_cast<float>(key_scale_steps(index + 1));
  return low + (bits == 2 ? 0.5f : 0.25f) * (high - low);
}

// What a tile stores of a token's norm index (8 bits, 2^(index/8 - kTokenNormBias); 0: norm 0), by
// the largest index of the tile; all norms of the tile are below 2^norm_octave. A key 15 octaves
// below the largest reads as 0.
constexpr int norm_octave(int largest) { return largest / 8 + 1 - kTokenNormBias; }
constexpr int stored_norm(int index, int largest) {
  const int stored = index - 8 * (norm_octave(largest) + kTokenNormBias - kNormBias);
  return index == 0 || stored < 0 ? 0 : stored;
}

constexpr int position_of(int token) { return 4 * (token % 8) + token / 8; }
constexpr int token_at(int position) { return position / 4 + 8 * (position % 4); }

// Fixed pseudo-random sign of a channel (finaliser of MurmurHash3 on channel + 1): keeps a vector
// with a common offset from ending in one Hadamard coefficient.
constexpr float channel_sign(int channel) {
  auto h = static_cast<std::uint32_t>(channel + 1);
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  h ^= h >> 16;
  return (h & 1u) != 0 ? -1.0f : 1.0f;
}

// A tile of a larger head_dim starts on a larger boundary: where tiles begin within a cache line,
// each access of a warp or vector touches one line more, which costs a GPU more time than the
// padding (1.4 % of a k2v2 tile of head_dim 128). Below 128 the padding would be the larger part.
constexpr int tile_alignment(int head_dim) {
  return head_dim >= 256 ? 128 : head_dim >= 128 ? 64 : 32;
}

struct TileLayout {
  int head_dim = 128;
  Format format = kK2V2;

  constexpr int k_code_bytes() const { return kTileTokens * head_dim * format.k_bits / 8; }
  constexpr int v_code_bytes() const { return kTileTokens * head_dim * format.v_bits / 8; }

  constexpr int k_codes_offset() const { return 0; }
  constexpr int v_codes_offset() const { return k_code_bytes(); }
  constexpr int k_params_offset() const { return v_codes_offset() + v_code_bytes(); }
  constexpr int v_scales_offset() const { return k_params_offset() + head_dim; }
  constexpr int v_mids_offset() const { return v_scales_offset() + kTileTokens; }
  constexpr int k_norms_offset() const { return v_mids_offset() + kTileTokens; }
  constexpr int used_bytes() const { return k_norms_offset() + kTileTokens; }
  constexpr int tile_bytes() const {
    const int alignment = tile_alignment(head_dim);
    return (used_bytes() + alignment - 1) / alignment * alignment;
  }

  // Channels that share one word: of one token for K, of one group stride for V.
  constexpr int k_channels_per_word() const { return 32 / format.k_bits; }
  constexpr int k_lines() const { return head_dim / k_channels_per_word(); }
  constexpr int v_groups() const { return 8 / format.v_bits; }
  constexpr int v_group_channels() const { return head_dim / v_groups(); }

  // Word index and bit shift of one code within its section.
  constexpr int k_word(int position, int channel) const {
    return channel / k_channels_per_word() * kTileTokens + position;
  }
  constexpr int k_shift(int channel) const {
    const int within = channel % k_channels_per_word();
    return 8 * (within % 4) + format.k_bits * (within / 4);
  }
  constexpr int v_word(int position, int channel) const {
    return position / 4 * v_group_channels() + channel % v_group_channels();
  }
  constexpr int v_shift(int position, int channel) const {
    return 8 * (position % 4) + format.v_bits * (channel / v_group_channels());
  }
  constexpr double bits_per_element() const {
    return 8.0 * tile_bytes() / (2.0 * kTileTokens * head_dim);
  }
};

static_assert(TileLayout{64, kK2V2}.tile_bytes() == 1184);
static_assert(TileLayout{128, kK2V2}.tile_bytes() == 2304);
static_assert(TileLayout{256, kK2V2}.tile_bytes() == 4480);
static_assert(TileLayout{128, kK4V2}.tile_bytes() == 3328);
static_assert(TileLayout{128, kK4V4}.tile_bytes() == 4352);
static_assert(TileLayout{80, kK2V2}.tile_bytes() == TileLayout{80, kK2V2}.used_bytes() + 16);
static_assert(TileLayout{64, kK2V2}.bits_per_element() == 2.3125);
static_assert(TileLayout{128, kK2V2}.bits_per_element() == 2.25);
static_assert(TileLayout{256, kK2V2}.bits_per_element() == 2.1875);
static_assert(TileLayout{128, kK2V2}.k_shift(16 + 4 * 3 + 2) == 8 * 2 + 2 * 3);
static_assert(stored_norm(255, 255) == kMaxNormIndex && stored_norm(248, 248) == 120);
static_assert(stored_norm(136, 255) == 8 && stored_norm(128, 255) == 0 && stored_norm(0, 7) == 0);
static_assert(position_of(8) == 1 && position_of(1) == 4 && token_at(position_of(29)) == 29);
static_assert(hadamard_block(96) == 32 && hadamard_block(80) == 16 && hadamard_block(256) == 256);

}  // namespace oscar
