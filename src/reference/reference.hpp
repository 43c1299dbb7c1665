// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The oracle: both operations, scalar, in the order of the documentation. Never optimised.
#pragma once

#include "core/calls.hpp"

namespace oscar::reference {

// float32 throughout, in the exact order of docs/format.md.
void append(const AppendCall& call);

// double throughout; the output is rounded once.
void attend(const AttendCall& call);

}  // namespace oscar::reference
