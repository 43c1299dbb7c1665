// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// A checked call as every backend gets it: nothing in it can be wrong any more.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "oscar/append.hpp"
#include "oscar/attend.hpp"

namespace oscar {

struct AppendCall {
  Layout layout;
  CacheView cache;
  Batch batch;
  ConstRows k;
  ConstRows v;
  AppendPart part = AppendPart::kBoth;
};

struct AttendCall {
  Layout layout;
  CacheView cache;
  Batch batch;
  ConstRows q;
  ConstRows k_new;
  ConstRows v_new;
  AttendOptions options;
  MutableRows out;
  float* lse = nullptr;
  std::span<std::byte> workspace;
};

// One implementation of the two operations.
struct BackendOps {
  std::string_view name;
  bool (*available)();
  void (*append)(const AppendCall& call);
  void (*attend)(const AttendCall& call);
};

extern const BackendOps kReferenceBackend;
extern const BackendOps kScalarBackend;
extern const BackendOps kAvx2Backend;
extern const BackendOps kAvx512VnniBackend;
extern const BackendOps kNeonBackend;

}  // namespace oscar
