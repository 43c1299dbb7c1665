// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Launches the sm_90a kernel; apart from extend.cu, because wgmma exists for that target only.
#include "cuda/device.hpp"
#include "cuda/extend_launch.hpp"
#include "cuda/extend_wgmma.cuh"

namespace oscar::cuda {
namespace {

template <int kHeadDim>
void launch(const CudaAttendCall& call, const Splits& splits, cudaStream_t stream) {
  using Shape = WgmmaShape<kHeadDim>;
  const int shared = Shape::shared_bytes(call.layout.tile());
  cudaFuncSetAttribute(extend_wgmma<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  const dim3 grid(static_cast<unsigned>(splits.blocks * splits.count),
                  static_cast<unsigned>(call.layout.kv_heads));
  extend_wgmma<kHeadDim><<<grid, Shape::kThreads, shared, stream>>>(call, splits);
}

}  // namespace

bool has_extend_sm90(const Layout& layout) {
  const int head_dim = layout.head_dim;
  if (head_dim != 64 && head_dim != 128 && head_dim != 256) return false;
  const TileLayout tile = layout.tile();
  const int shared = head_dim == 64    ? WgmmaShape<64>::shared_bytes(tile)
                     : head_dim == 128 ? WgmmaShape<128>::shared_bytes(tile)
                                       : WgmmaShape<256>::shared_bytes(tile);
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0 && shared <= most_shared_bytes();
}

bool launch_extend_sm90(const CudaAttendCall& call, const Splits& splits, cudaStream_t stream) {
  if (!has_extend_sm90(call.layout)) return false;
  if (call.layout.head_dim == 64) {
    launch<64>(call, splits, stream);
  } else if (call.layout.head_dim == 128) {
    launch<128>(call, splits, stream);
  } else {
    launch<256>(call, splits, stream);
  }
  return true;
}

}  // namespace oscar::cuda
