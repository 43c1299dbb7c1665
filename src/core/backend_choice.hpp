// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/calls.hpp"
#include "oscar/status.hpp"

namespace oscar {

// The implementation that serves this call (backend.hpp has the rule).
Status choose_backend(const BackendOps*& backend);

}  // namespace oscar
