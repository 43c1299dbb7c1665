// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "arrays.hpp"

namespace oscar::python {

// Sums the 64-bit words of a contiguous array with all threads: the time a benchmark compares with.
std::uint64_t read_bytes(const Array& array);

}  // namespace oscar::python
