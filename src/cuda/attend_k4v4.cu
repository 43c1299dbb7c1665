// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
#include "cuda/attend_launch.cuh"

namespace oscar::cuda {

template void launch_decode_format<4, 4>(const CudaAttendCall& call, DecodeLaunch what,
                                         cudaStream_t stream);

}  // namespace oscar::cuda
