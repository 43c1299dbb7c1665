// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// feedback: the rounding error of a K channel moves on to the channels behind it, weighted so that
// what remains hurts the scores of typical queries least (docs/format.md). A channel waits for the
// codes of all before it; four channels at a time gather the older errors in registers, those of
// the next four while the present four are rounded one after the other.
#pragma once

#include "oscar/format.hpp"

namespace oscar::cpu {
namespace {

inline constexpr int kFedChannels = 4;
inline constexpr int kFedVectors = 2;  // of positions: two share each weight
inline constexpr int kFedTokens = kFedVectors * kLanes;
// Columns of weights that are widened at a time.
inline constexpr int kFedPanel = 16;

struct FedChannels {
  Vf z[kFedChannels][kFedVectors];
};

struct FedErrors {
  alignas(64) float at[kMaxHeadDim][kFedTokens];
};

struct FedWeights {
  alignas(64) float at[kMaxHeadDim][kFedPanel];  // [from channel][to channel - first]
  int first;
};

// Weights for channels first .. first + 15 of all before the last of them.
inline void load_weights(const std::uint16_t* feedback, int head_dim, int first,
                         FedWeights& weights) {
  weights.first = first;
  for (int i = 0; i < first + kFedPanel; ++i) {
    const auto* row = reinterpret_cast<const std::byte*>(feedback + i * head_dim + first);
    for (int c = 0; c < kFedPanel; c += kLanes) store(weights.at[i] + c, load_fp16(row + 2 * c));
  }
}

inline FedChannels load_channels(const float* columns, int c) {
  FedChannels channels;
#pragma GCC unroll 4
  for (int k = 0; k < kFedChannels; ++k) {
#pragma GCC unroll 2
    for (int w = 0; w < kFedVectors; ++w) {
      channels.z[k][w] = load(columns + (c + k) * kTileTokens + w * kLanes);
    }
  }
  return channels;
}

// The error of channel i for channels c .. c + 3.
[[gnu::always_inline]] inline void add_error(const FedErrors& errors, int i,
                                             const FedWeights& weights, int c,
                                             FedChannels& channels) {
  const float* weight = weights.at[i] + (c - weights.first);
  Vf error[kFedVectors];
#pragma GCC unroll 2
  for (int w = 0; w < kFedVectors; ++w) error[w] = load(errors.at[i] + w * kLanes);
#pragma GCC unroll 4
  for (int k = 0; k < kFedChannels; ++k) {
    const Vf factor = splat(weight[k]);
#pragma GCC unroll 2
    for (int w = 0; w < kFedVectors; ++w) {
      channels.z[k][w] = fused_multiply_add(error[w], factor, channels.z[k][w]);
    }
  }
}

// The errors of channels begin .. end - 1.
[[gnu::always_inline]] inline void add_errors(const FedErrors& errors, int begin, int end,
                                              const FedWeights& weights, int c,
                                              FedChannels& channels) {
  for (int i = begin; i < end; ++i) add_error(errors, i, weights, c, channels);
}

// Channels c .. c + 3 are rounded; meanwhile `next`, the four behind them, get the errors of all
// channels up to c + 3. behind: weights for `next`, null where c .. c + 3 are the last.
template <int kBits>
[[gnu::always_inline]] inline void feed_channels(int c, const KeyParams& params,
                                                 const FedWeights& panel, const FedWeights* behind,
                                                 FedErrors& errors, FedChannels& now,
                                                 FedChannels& next, Vi (&codes)[kFedVectors]) {
  constexpr float kMiddle = 0.5f * static_cast<float>(max_code(kBits));
  const int after = c + kFedChannels;
#pragma GCC unroll 4
  for (int k = 0; k < kFedChannels; ++k) {
    const Vf mid = splat(params.mids[c + k]);
    const Vf inverse = splat(params.inverses[c + k]);
    const Vf scale = splat(params.scales[c + k]);
#pragma GCC unroll 2
    for (int w = 0; w < kFedVectors; ++w) {
      Vf z = now.z[k][w];
#pragma GCC unroll 3
      for (int j = 0; j < k; ++j) {
        z = fused_multiply_add(now.z[j][w], splat(panel.at[c + j][c + k - panel.first]), z);
      }
      const Vi code = code_of<kBits>(z, mid, inverse);
      codes[w] = k == 0 ? code : codes[w] | shift_left(code, 8 * k);
      now.z[k][w] = mid + scale * (to_float(code) - splat(kMiddle)) - z;
      store(errors.at[c + k] + w * kLanes, now.z[k][w]);
    }
    if (behind == nullptr) continue;
    add_errors(errors, c / kFedChannels * k, c / kFedChannels * (k + 1), *behind, after, next);
  }
  if (behind == nullptr) return;
#pragma GCC unroll 4
  for (int k = 0; k < kFedChannels; ++k) add_error(errors, c + k, *behind, after, next);
}

// Codes of kFedTokens positions, packed as pack_keys does.
template <int kBits>
inline void pack_fed_positions(const std::uint16_t* feedback, int head_dim, const KeyParams& params,
                               const float* columns, std::uint8_t* words) {
  constexpr int kPerWord = 32 / kBits;
  FedErrors errors;
  FedWeights panels[2];
  load_weights(feedback, head_dim, 0, panels[0]);
  FedChannels next = load_channels(columns, 0);
  Vi word[kFedVectors] = {splat_int(0), splat_int(0)};
  for (int c = 0; c < head_dim; c += kFedChannels) {
    const int after = c + kFedChannels;
    const FedWeights& panel = panels[c / kFedPanel % 2];
    FedWeights* behind = after < head_dim ? &panels[after / kFedPanel % 2] : nullptr;
    FedChannels now = next;
    if (behind != nullptr) {
      if (after % kFedPanel == 0) load_weights(feedback, head_dim, after, *behind);
      next = load_channels(columns, after);
    }
    Vi codes[kFedVectors];
    feed_channels<kBits>(c, params, panel, behind, errors, now, next, codes);
    const int group = c % kPerWord / kFedChannels;
#pragma GCC unroll 2
    for (int w = 0; w < kFedVectors; ++w) {
      const Vi part = shift_left(codes[w], kBits * group);
      word[w] = group == 0 ? part : word[w] | part;
      if ((c + kFedChannels) % kPerWord == 0) {
        store_int(words + 4 * (c / kPerWord * kTileTokens + w * kLanes), word[w]);
      }
    }
  }
}

// As pack_keys; feedback [head_dim][head_dim].
template <int kBits>
inline void pack_fed_keys(const std::uint16_t* feedback, int head_dim, const KeyParams& params,
                          const float* columns, std::uint8_t* words) {
  for (int p = 0; p < kTileTokens; p += kFedTokens) {
    pack_fed_positions<kBits>(feedback, head_dim, params, columns + p, words + 4 * p);
  }
}

}  // namespace
}  // namespace oscar::cpu
