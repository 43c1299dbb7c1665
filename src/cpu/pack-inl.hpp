// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Codes into the 32-bit words of format.hpp. A K word is one lane (position) of 16 or 8 channels, a
// V word one lane (channel) of four tokens and all groups: or and shift, no lane ever moves.
#pragma once

#include "oscar/format.hpp"

namespace oscar::cpu {
namespace {

// `columns` [head_dim][32 positions].
template <int kBits>
inline void pack_keys(const float* columns, int head_dim, const KeyParams& params,
                      std::uint8_t* words) {
  constexpr int kPerWord = 32 / kBits;
  for (int c = 0; c < head_dim; c += kPerWord) {
    for (int p = 0; p < kTileTokens; p += kLanes) {
      Vi word = splat_int(0);
#pragma GCC unroll 16
      for (int k = 0; k < kPerWord; ++k) {
        const Vf z = load(columns + (c + k) * kTileTokens + p);
        const Vi code = code_of<kBits>(z, splat(params.mids[c + k]), splat(params.inverses[c + k]));
        word = word | shift_left(code, 8 * (k % 4) + kBits * (k / 4));
      }
      store_int(words + 4 * (c / kPerWord * kTileTokens + p), word);
    }
  }
}

// `rows` [32 positions][kMaxHeadDim]; a vector may run past a row's end into the next one, so there
// is one more vector behind the last row.
template <int kBits>
inline void pack_values(const float* rows, int head_dim, const ValueParams& params,
                        std::uint8_t* words) {
  constexpr int kGroups = 8 / kBits;
  const int group_channels = head_dim / kGroups;
  for (int quad = 0; quad < kTileTokens / 4; ++quad) {
    for (int j = 0; j < group_channels; j += kLanes) {
      Vi word = splat_int(0);
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        const int p = 4 * quad + b;
        const Vf mid = splat(params.mids[p]);
        const Vf inverse = splat(params.inverses[p]);
        const float* row = rows + p * kMaxHeadDim + j;
#pragma GCC unroll 4
        for (int i = 0; i < kGroups; ++i) {
          const Vi code = code_of<kBits>(load(row + i * group_channels), mid, inverse);
          word = word | shift_left(code, 8 * b + kBits * i);
        }
      }
      std::uint8_t* target = words + 4 * (quad * group_channels + j);
      if (j + kLanes <= group_channels) {
        store_int(target, word);
      } else {
        alignas(64) std::int32_t lanes[kLanes];
        store_int(lanes, word);
        std::memcpy(target, lanes,
                    sizeof(std::int32_t) * static_cast<std::size_t>(group_channels - j));
      }
    }
  }
}

}  // namespace
}  // namespace oscar::cpu
