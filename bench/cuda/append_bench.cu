// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Time of packing: decode steps of 32 layers in one graph, with and without a tile that they
// complete, and prompts beside a device copy, in one process. bf16 rows, 8 KV heads of 128,
// balance.
//
//   append_bench [center]     one JSON line a case, with a center or without: median us of a
//   layer's call; of prompts also the bytes
//                    read and written a second over those of a copy of K and V
#include <cuda_fp16.h>

#include <memory>
#include <string>

#include "bench.cuh"
#include "oscar/cuda.hpp"

namespace {

using namespace oscar::bench;
using oscar::DType;

constexpr int kHeads = 8;
constexpr int kHeadDim = 128;

// Weights as small as those of real models.
__global__ void fill_feedback(__half* weights, int count) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const float uniform = static_cast<float>(hashed(static_cast<std::uint64_t>(i))) * 0x1p-32f;
    weights[i] = __float2half(0.2f * (uniform - 0.5f));
  }
}
__global__ void fill_balance(float* balance, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    balance[i] = 0.5f + static_cast<float>(hashed(static_cast<std::uint64_t>(i))) * 0x1p-32f;
  }
}

struct Case {
  int batch;
  int cached;  // tokens of each sequence before the call
  int tokens;  // of each sequence in the call
  int layers;  // calls of one graph
  bool feedback;
  bool center;
};

// One layer's cache and rows.
struct Layer {
  Layer(const Case& given, const oscar::Layout& layout, int max_pages)
      : pages(static_cast<std::size_t>(given.batch) * max_pages * layout.page_bytes()),
        exact(static_cast<std::size_t>(given.batch) * layout.exact_block_bytes()),
        rows(static_cast<std::size_t>(2) * given.batch * given.tokens * kHeads * kHeadDim * 2) {
    fill_rows<<<256, 512>>>(exact.as<__nv_bfloat16>(), static_cast<std::int64_t>(exact.size() / 2));
    fill_rows<<<1056, 512>>>(rows.as<__nv_bfloat16>(), static_cast<std::int64_t>(rows.size() / 2));
  }
  Buffer pages, exact, rows;
};

class Prepared {
 public:
  explicit Prepared(const Case& given)
      : case_(given),
        max_pages_((given.cached + given.tokens + layout_.page_tokens - 1) / layout_.page_tokens),
        block_table_(counted(given.batch * max_pages_, 1)),
        slot_(counted(given.batch, 1)),
        seq_len_(std::vector<std::int32_t>(static_cast<std::size_t>(given.batch), given.cached)),
        query_start_(counted(given.batch + 1, given.tokens)),
        balance_(kHeads * kHeadDim * sizeof(float)),
        center_(kHeads * kHeadDim * sizeof(float)),
        feedback_(static_cast<std::size_t>(kHeads) * kHeadDim * kHeadDim * sizeof(__half)) {
    fill_balance<<<1, 256>>>(balance_.as<float>(), kHeads * kHeadDim);
    check(cudaMemset(center_.as<void>(), 0, center_.size()));
    fill_feedback<<<64, 256>>>(feedback_.as<__half>(), kHeads * kHeadDim * kHeadDim);
    for (int i = 0; i < given.layers; ++i) {
      layers_.push_back(std::make_unique<Layer>(given, layout_, max_pages_));
    }
    check(cudaDeviceSynchronize());
  }

  void append(cudaStream_t stream) const {
    const std::int64_t tokens = static_cast<std::int64_t>(case_.batch) * case_.tokens;
    for (const auto& layer : layers_) {
      oscar::CacheView cache{.pages = layer->pages.as<std::uint8_t>(),
                             .num_pages = static_cast<std::int64_t>(case_.batch) * max_pages_,
                             .block_table = block_table_.as<std::int32_t>(),
                             .max_pages = max_pages_,
                             .exact = layer->exact.as<void>(),
                             .slots = case_.batch,
                             .slot = slot_.as<std::int32_t>(),
                             .seq_len = seq_len_.as<std::int32_t>()};
      cache.balance = balance_.as<float>();
      if (case_.center) cache.center = center_.as<float>();
      if (case_.feedback) cache.feedback = feedback_.as<std::uint16_t>();
      const auto rows = [&](int side) {
        return oscar::ConstRows{layer->rows.as<std::uint16_t>() + side * tokens * kHeads * kHeadDim,
                                DType::kBF16,
                                tokens,
                                kHeads,
                                kHeads * kHeadDim,
                                kHeadDim};
      };
      check(oscar::cuda::append(layout_, cache, {case_.batch, query_start_.as<std::int32_t>()},
                                rows(0), rows(1), oscar::AppendPart::kBoth, stream));
    }
  }

  // 16-bit rows that are read and tiles that are written, of one layer.
  [[nodiscard]] std::int64_t bytes() const {
    const std::int64_t tiles =
        (case_.cached + case_.tokens) / oscar::kTileTokens - case_.cached / oscar::kTileTokens;
    return static_cast<std::int64_t>(layers_[0]->rows.size()) +
           case_.batch * kHeads * tiles * layout_.tile().tile_bytes();
  }
  [[nodiscard]] const Buffer& rows() const { return layers_[0]->rows; }

 private:
  static std::vector<std::int32_t> counted(int count, int step) {
    std::vector<std::int32_t> values(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) values[static_cast<std::size_t>(i)] = i * step;
    return values;
  }

  Case case_;
  oscar::Layout layout_{.kv_heads = kHeads, .head_dim = kHeadDim};
  int max_pages_;
  Buffer block_table_, slot_, seq_len_, query_start_, balance_, center_, feedback_;
  std::vector<std::unique_ptr<Layer>> layers_;
};

void measure(const Case& given, const Buffer& flush, const char* gpu) {
  const Prepared data(given);
  const double us =
      median_us(
          flush, [&](cudaStream_t stream) { data.append(stream); }, given.tokens > 1) /
      given.layers;
  const bool completes =
      given.cached / oscar::kTileTokens != (given.cached + given.tokens) / oscar::kTileTokens;
  std::string rate;
  if (given.tokens > 1) {
    const Buffer to(data.rows().size());
    const double copy = median_us(flush, [&](cudaStream_t stream) {
      check(cudaMemcpyAsync(to.as<void>(), data.rows().as<void>(), to.size(),
                            cudaMemcpyDeviceToDevice, stream));
    });
    const double share =
        (static_cast<double>(data.bytes()) / us) / (2.0 * static_cast<double>(to.size()) / copy);
    rate =
        ", \"copy_us\": " + std::to_string(copy) + ", \"of_copy_rate\": " + std::to_string(share);
  }
  std::printf(
      "{\"kernel\": \"append k2v2\", \"shape\": \"%d/%d\", \"batch\": %d, \"cached\": %d, "
      "\"tokens\": %d, \"layers\": %d, \"feedback\": %s, \"center\": %s, "
      "\"completes_tile\": %s, "
      "\"us\": %.2f%s, \"gpu\": \"%s\"}\n",
      kHeads, kHeadDim, given.batch, given.cached, given.tokens, given.layers,
      given.feedback ? "true" : "false", given.center ? "true" : "false",
      completes ? "true" : "false", us, rate.c_str(), gpu);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const bool center = argc > 1 && std::string(argv[1]) == "center";
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0));
  const Buffer flush(4 * static_cast<std::size_t>(device.l2CacheSize));
  for (const bool feedback : {false, true}) {
    for (const int batch : {1, 8, 64}) {
      for (const int cached : {280, 287})
        measure({batch, cached, 1, 32, feedback, center}, flush, device.name);
    }
    for (const int tokens : {512, 2048, 8192}) {
      measure({1, 0, tokens, 1, feedback, center}, flush, device.name);
    }
    measure({8, 0, 32768, 1, feedback, center}, flush, device.name);
  }
  return 0;
}
