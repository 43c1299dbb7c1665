// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// feedback of a few tiles, where one tile's time counts: a warp rounds channel after channel, a
// lane a position, and never waits for the others unless they are late. It adds each error to the
// rest of its block of eight channels and to the next block itself; the errors of a finished block
// are added by other warps to the channels after the next block, while it rounds that one. Every
// value gets its terms in the order of the channels, as in feedback.cuh.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/feedback.cuh"
#include "cuda/quantize.cuh"

namespace oscar::cuda {

inline constexpr int kBlockChannels = 8;

// Shared memory of a tile's feedback. Arrays of channels are a block longer, as the rounding warp
// reads ahead.
template <int kHeadDim>
struct FeedbackStep {
  static constexpr int kLines = kHeadDim / kLineChannels;
  static constexpr int kReadable = kHeadDim + kBlockChannels;

  // [c][k][s], fp16: for channel k of line s + 1 after c's own; places k are exchanged so that the
  // threads that write a row's first channels take different banks.
  alignas(16) std::uint16_t later[kHeadDim][kLineChannels][kLines];
  alignas(16) float near[kReadable][2 * kBlockChannels];  // for channels of c's block and the next
  // 2 bits: the least values of codes 1, 2 and 3. 4 bits: negative_error's mid, inverse / 2^bits
  // and scale 2^bits. Then the weight for channel c + 1.
  alignas(16) float bounds[kReadable][4];
  alignas(16) float levels[kReadable][4];  // 2 bits: what the codes stand for
  // [c][position]: a value on its way, then the channel's negative error.
  alignas(16) float columns[kReadable][kTileTokens];

  [[nodiscard]] static __device__ int place_of(int c, int k) { return k ^ k / 8 ^ c % 2 * 2; }
};

// Fills later from feedback [head_dim][head_dim]; thread: of kThreads.
template <int kThreads, int kHeadDim>
__device__ inline void load_later(const std::uint16_t* feedback, int thread,
                                  FeedbackStep<kHeadDim>& shared) {
  constexpr int kLines = FeedbackStep<kHeadDim>::kLines;
  constexpr int kTasks = kHeadDim * 4 / kThreads;               // of four channels of each line
  constexpr int kTogether = kTasks < 4 ? kTasks : 32 / kLines;  // whose loads are under way
  static_assert(kTasks % kTogether == 0);
#pragma unroll 1
  for (int first_task = 0; first_task < kTasks; first_task += kTogether) {
    uint2 raw[kTogether][kLines];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const int i = thread + (first_task + t) * kThreads;
      const int line = i / 4 / kLineChannels + 1;
      const std::uint16_t* from = feedback + i / 4 * kHeadDim + line * kLineChannels + i % 4 * 4;
#pragma unroll
      for (int s = 0; s < kLines; ++s) {
        raw[t][s] = make_uint2(0, 0);
        if (line + s < kLines) {
          raw[t][s] = *reinterpret_cast<const uint2*>(from + s * kLineChannels);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const int i = thread + (first_task + t) * kThreads;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        std::uint32_t words[kLines / 2];
#pragma unroll
        for (int s = 0; s < kLines / 2; ++s) {
          const uint2 a = raw[t][2 * s];
          const uint2 b = raw[t][2 * s + 1];
          words[s] =
              __byte_perm(k < 2 ? a.x : a.y, k < 2 ? b.x : b.y, k % 2 == 0 ? 0x5410 : 0x7632);
        }
        auto* to =
            reinterpret_cast<uint2*>(shared.later[i / 4][shared.place_of(i / 4, i % 4 * 4 + k)]);
#pragma unroll
        for (int s = 0; s < kLines / 4; ++s) to[s] = make_uint2(words[2 * s], words[2 * s + 1]);
      }
    }
  }
}

// Fills near and the weights beside the bounds.
template <int kThreads, int kHeadDim>
__device__ inline void load_near(const std::uint16_t* feedback, int thread,
                                 FeedbackStep<kHeadDim>& shared) {
#pragma unroll
  for (int i = thread; i < kHeadDim * 2; i += kThreads) {
    const int c = i / 2;
    const int channel = c / kBlockChannels * kBlockChannels + i % 2 * kBlockChannels;
    if (channel >= kHeadDim) continue;
    const uint4 raw = *reinterpret_cast<const uint4*>(feedback + c * kHeadDim + channel);
    auto* to = reinterpret_cast<float4*>(shared.near[c] + i % 2 * kBlockChannels);
    const std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float2 a = __half22float2(reinterpret_cast<const __half2&>(words[2 * k]));
      const float2 b = __half22float2(reinterpret_cast<const __half2&>(words[2 * k + 1]));
      to[k] = make_float4(a.x, a.y, b.x, b.y);
    }
    if (i % 2 == 1 || c % kBlockChannels == kBlockChannels - 1) continue;
    shared.bounds[c][3] = __half2float(__ushort_as_half(feedback[c * kHeadDim + c + 1]));
  }
}

// The x whose place among the floats is n above; not across zero.
__device__ inline float steps_above(float x, int n) {
  return __int_as_float(__float_as_int(x) + (x < 0.0f ? -n : n));
}

// The smallest value whose code is i + 1 or more, 2 bits: no step of rounding ever falls, so three
// bounds say all about it. Each loop tries the last places around a guess. grid: with inverse / 4;
// scale: times 4.
__device__ inline float least_value(Grid grid, float scale, int i) {
  if (grid.inverse == 0.0f) return i < 2 ? -INFINITY : INFINITY;  // all values get code 2
  // The least product for which (product + 0.375) rounds to (i + 1) / 4: ties are even.
  const float product = i == 0 ? -0x1.fffffep-3f : i == 1 ? -0x1p-26f : 0x1.000004p-2f;
  const float first = steps_above(product * scale, -3);
  int less = 0;
#pragma unroll
  for (int n = 0; n < 6; ++n) less += steps_above(first, n) * grid.inverse < product ? 1 : 0;
  const float difference = steps_above(first, less);
  // value - mid rounds up to it from half a last place below.
  const float half = 0.5f * (difference - steps_above(difference, -1));
  const float lowest = steps_above((grid.mid + difference) - half, -2);
  less = 0;
#pragma unroll
  for (int n = 0; n < 5; ++n) less += steps_above(lowest, n) - grid.mid < difference ? 1 : 0;
  return steps_above(lowest, less);
}

// One number of a channel's bounds and levels; i: 0 to 3, by different threads.
template <int kBits, int kHeadDim>
__device__ inline void put_grid(Grid grid, float scale, int c, int i,
                                FeedbackStep<kHeadDim>& shared) {
  float bound = i == 0 ? grid.mid : i == 1 ? grid.inverse : scale;
  if constexpr (kBits == 2) {
    bound = least_value(grid, scale, i);
    shared.levels[c][i] = grid.mid + scale * (static_cast<float>(i) * 0.25f - 0.375f);
  }
  if (i < 3) shared.bounds[c][i] = bound;
}

// The error of the level that z has, whose code, times `one`, is added to the word. Predicates of
// ever fewer values, so that the last one that holds decides: fewer instructions than choosing.
__device__ inline float rounded_error(float z, float4 bounds, float4 levels, std::uint32_t one,
                                      std::uint32_t& word) {
  float error;
  asm("{\n"
      ".reg .pred p, q, r;\n"
      "setp.ge.f32 p, %2, %3;\n"
      "setp.ge.f32 q, %2, %4;\n"
      "setp.ge.f32 r, %2, %5;\n"
      "sub.f32 %0, %6, %2;\n"
      "@p sub.f32 %0, %7, %2;\n"
      "@q sub.f32 %0, %8, %2;\n"
      "@r sub.f32 %0, %9, %2;\n"
      "@p add.u32 %1, %1, %10;\n"
      "@q add.u32 %1, %1, %10;\n"
      "@r add.u32 %1, %1, %10;\n"
      "}"
      : "=&f"(error), "+r"(word)
      : "f"(z), "f"(bounds.x), "f"(bounds.y), "f"(bounds.z), "f"(levels.x), "f"(levels.y),
        "f"(levels.z), "f"(levels.w), "r"(one));
  return error;
}

// The words to which round_value adds.
template <int kBits>
inline constexpr std::uint32_t kNoCodes = kBits == 2 ? 0u : 0u - magic_sum<kBits>();

// The negative error of a value; its code, at `shift`, goes into the word.
template <int kBits>
__device__ inline float round_value(float z, float4 bounds, float4 levels, int shift,
                                    std::uint32_t& word) {
  if constexpr (kBits == 2) {
    return rounded_error(z, bounds, levels, 1u << shift, word);
  } else {
    std::uint32_t code = 0;
    const float error = negative_error<kBits>(z, {bounds.x, bounds.y}, bounds.z, &code);
    word += code << shift;
    return error;
  }
}

// The part of a tile that a block rounds: 2^log_quads of its eight quads of positions, from `first`
// on. Half as many warps add errors, 32 (quad, channel of a line) pairs each.
struct StepPart {
  int first;
  int log_quads;
  [[nodiscard]] __device__ int positions() const { return 4 << log_quads; }
  [[nodiscard]] __device__ int updaters() const { return 1 << log_quads >> 1; }
  [[nodiscard]] __device__ int threads() const { return (updaters() + 1) * kWarp; }
};

// Barriers: the errors of a block are there; the block after the next has them all. Neither side
// can arrive twice before the other has waited: errors follow the block they were added to.
inline constexpr int kErrorsBarrier = 2;
inline constexpr int kBlockBarrier = 3;

// The rounding warp's registers.
template <int kHeadDim, int kBits>
struct Rounding {
  static constexpr int kTake = 5;   // channel of a block before which the next one is read
  static constexpr int kAhead = 4;  // channels whose bounds and levels are on their way

  FeedbackStep<kHeadDim>& shared;
  int position;
  float z[kBlockChannels];
  float next[kBlockChannels];
  float errors[kTake];
  float4 bounds[kAhead];
  float4 levels[kAhead];
  std::uint32_t word;

  static __device__ float4 four(const float* from) {
    return *reinterpret_cast<const float4*>(from);
  }
  __device__ void read_grid(int c, int k) {
    bounds[k % kAhead] = four(shared.bounds[c + k]);
    if constexpr (kBits == 2) levels[k % kAhead] = four(shared.levels[c + k]);
  }
  __device__ void start() {
#pragma unroll
    for (int k = 0; k < kBlockChannels; ++k) z[k] = shared.columns[k][position];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) read_grid(0, k);
  }
  // The next block, with the errors that this one has so far.
  __device__ void take(int c, int threads) {
    wait_at(kBlockBarrier, threads);
#pragma unroll
    for (int i = 0; i < kBlockChannels; ++i) {
      next[i] = shared.columns[c + kBlockChannels + i][position];
    }
#pragma unroll
    for (int k = 0; k < kTake; ++k) add_to_next(errors[k], c + k);
  }
  __device__ void add_to_next(float error, int c) {
    const float4 low = four(shared.near[c] + kBlockChannels);
    const float4 high = four(shared.near[c] + kBlockChannels + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      next[i] = __fmaf_rn(error, (&low.x)[i], next[i]);
      next[i + 4] = __fmaf_rn(error, (&high.x)[i], next[i + 4]);
    }
  }
  // The block of channels from c on.
  __device__ void round(int c, bool writes, int threads) {
    word = kNoCodes<kBits>;
#pragma unroll
    for (int k = 0; k < kBlockChannels; ++k) {
      if (k == kTake) take(c, threads);
      const float4 low = four(shared.near[c + k]);
      const float4 high = four(shared.near[c + k] + 4);
      const float error = round_value<kBits>(z[k], bounds[k % kAhead], levels[k % kAhead],
                                             8 * (k % 4) + kBits * (k / 4), word);
      if (k + 1 < kBlockChannels) z[k + 1] = __fmaf_rn(error, bounds[k % kAhead].w, z[k + 1]);
      read_grid(c + kAhead, k);
      if (writes) shared.columns[c + k][position] = error;
#pragma unroll
      for (int later = k + 2; later < kBlockChannels; ++later) {
        z[later] = __fmaf_rn(error, later < 4 ? (&low.x)[later] : (&high.x)[later - 4], z[later]);
      }
      if (k < kTake) {
        errors[k] = error;
      } else {
        add_to_next(error, c + k);
      }
    }
#pragma unroll
    for (int k = 0; k < kBlockChannels; ++k) z[k] = next[k];
  }
};

// The rounding warp. Lane i: position 4 first + i; the lanes beyond the part's end do the same as
// others, but for writing.
template <int kHeadDim, int kBits>
__device__ inline void round_channels(StepPart part, int lane, FeedbackStep<kHeadDim>& shared,
                                      std::uint8_t* codes) {
  constexpr int kBlocks = kHeadDim / kBlockChannels;
  const bool writes = lane < part.positions();
  const int threads = part.threads();
  Rounding<kHeadDim, kBits> state{shared, 4 * part.first + (lane & (part.positions() - 1))};
  auto* words = reinterpret_cast<std::uint32_t*>(codes) + state.position;
  state.start();
  std::uint32_t even = 0;  // the codes of a line's first block
#pragma unroll 1
  for (int block = 0; block < kBlocks; ++block) {
    state.round(block * kBlockChannels, writes, threads);
    if (block + 1 < kBlocks) arrive_at(kErrorsBarrier, threads);
    if constexpr (kBits == 2) {
      if (writes && block % 2 == 1) words[block / 2 * kTileTokens] = even + (state.word << 4);
      even = state.word;
    } else {
      if (writes) words[block * kTileTokens] = state.word;
    }
  }
}

// The registers of an updating warp: a lane has four positions of channel k of every line, the line
// after the one that is being rounded first.
template <int kHeadDim>
struct Updating {
  static constexpr int kLines = FeedbackStep<kHeadDim>::kLines;

  FeedbackStep<kHeadDim>& shared;
  int k;
  int position;
  float4 values[kLines - 1];
  float4 errors[kBlockChannels];
  std::uint32_t weights[kBlockChannels][kLines / 2];

  __device__ void read_weights(int c) {
#pragma unroll
    for (int e = 0; e < kBlockChannels; ++e) {
      const auto* from = reinterpret_cast<const uint2*>(shared.later[c + e][shared.place_of(e, k)]);
#pragma unroll
      for (int i = 0; i < kLines / 4; ++i) {
        const uint2 two = from[i];
        weights[e][2 * i] = two.x;
        weights[e][2 * i + 1] = two.y;
      }
    }
  }
  [[nodiscard]] __device__ float4& column(int c) const {
    return *reinterpret_cast<float4*>(&shared.columns[c][position]);
  }
  __device__ void add(int s) {
#pragma unroll
    for (int e = 0; e < kBlockChannels; ++e) {
      const __half2 pair = reinterpret_cast<const __half2&>(weights[e][s / 2]);
      const float weight = s % 2 == 0 ? __low2float(pair) : __high2float(pair);
      values[s].x = __fmaf_rn(errors[e].x, weight, values[s].x);
      values[s].y = __fmaf_rn(errors[e].y, weight, values[s].y);
      values[s].z = __fmaf_rn(errors[e].z, weight, values[s].z);
      values[s].w = __fmaf_rn(errors[e].w, weight, values[s].w);
    }
  }
};

template <int kHeadDim>
__device__ inline void add_errors(StepPart part, int thread, FeedbackStep<kHeadDim>& shared) {
  constexpr int kLines = FeedbackStep<kHeadDim>::kLines;
  constexpr int kBlocks = kHeadDim / kBlockChannels;
  Updating<kHeadDim> state{shared, thread >> part.log_quads,
                           4 * (part.first + (thread & ((1 << part.log_quads) - 1)))};
#pragma unroll
  for (int s = 0; s < kLines - 1; ++s) {
    state.values[s] = state.column(kLineChannels * (s + 1) + state.k);
  }
  arrive_at(kBlockBarrier, part.threads());  // of the second block: nothing to add
#pragma unroll 1
  for (int block = 0; block + 1 < kBlocks; ++block) {
    const int c = block * kBlockChannels;
    const int live = kLines - 1 - block / 2;
    state.read_weights(c);
    wait_at(kErrorsBarrier, part.threads());
#pragma unroll
    for (int e = 0; e < kBlockChannels; ++e) state.errors[e] = state.column(c + e);
    state.add(0);
    // The block after the next one; it is in the first line here.
    if (state.k / kBlockChannels == block % 2 && live > 0) {
      state.column(kLineChannels * (block / 2 + 1) + state.k) = state.values[0];
    }
    arrive_at(kBlockBarrier, part.threads());
#pragma unroll
    for (int s = 1; s < kLines - 1; ++s) {
      if (s >= live) break;
      state.add(s);
    }
    if (block % 2 == 0) continue;
#pragma unroll
    for (int s = 0; s + 2 < kLines; ++s) state.values[s] = state.values[s + 1];
  }
}

}  // namespace oscar::cuda
