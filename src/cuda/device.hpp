// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// What the launchers ask of the current device; no call that could synchronise.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

namespace oscar::cuda {

// 0 where there is no device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  (void)cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int multiprocessors() {
  return std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
}

// Shared memory that a block may have. Compiled with -DOSCAR_MOST_SHARED=101376, any GPU pretends
// to be one with 99 KiB (sm_86, sm_89, sm_120).
inline int most_shared_bytes() {
  const int bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
#ifdef OSCAR_MOST_SHARED
  return std::min(bytes, OSCAR_MOST_SHARED);
#else
  return bytes;
#endif
}

}  // namespace oscar::cuda
