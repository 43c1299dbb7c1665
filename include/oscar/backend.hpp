// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// Which implementation runs. Chosen at the first call: OSCAR_BACKEND where set, else the fastest
// that this CPU has.
#pragma once

#include <string_view>
#include <vector>

#include "oscar/status.hpp"

namespace oscar {

// Names: reference, scalar, avx2, avx512vnni, neon. All that run on this machine, slowest first.
std::vector<std::string_view> available_backends();

// The one in use, or an error if OSCAR_BACKEND names one that is unknown or not available.
Status active_backend(std::string_view& name);

// Uses `name` from now on; "auto" returns to the choice at start.
Status set_backend(std::string_view name);

const char* version();

}  // namespace oscar
