// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// The compiler's 16-bit float, used for conversions only.
#pragma once

namespace oscar {

#ifdef __aarch64__
using Half = __fp16;  // GCC has _Float16 in C++ on arm64 from version 13 on
#else
using Half = _Float16;
#endif

}  // namespace oscar
