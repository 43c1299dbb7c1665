// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/calls.hpp"

namespace oscar::cuda {

struct Splits;

// The sm_90a kernel: false, and nothing launched, if the device or the head_dim has none.
// extend_sm90.cu is compiled for that target alone.
bool launch_extend_sm90(const CudaAttendCall& call, const Splits& splits, cudaStream_t stream);
bool has_extend_sm90(const Layout& layout);

}  // namespace oscar::cuda
