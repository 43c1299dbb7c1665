// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
#include "core/calls.hpp"
#include "reference/reference.hpp"

namespace oscar {

const BackendOps kReferenceBackend{"reference", [] { return true; }, reference::append,
                                   reference::attend};

}  // namespace oscar
