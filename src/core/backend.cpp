// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "oscar/backend.hpp"

#include <atomic>
#include <cstdlib>
#include <string>

#include "core/backend_choice.hpp"

namespace oscar {
namespace {

// Slowest first: the automatic choice is the last one that this CPU can run.
// clang-format off: one a line.
constexpr const BackendOps* kBackends[] = {
    &kReferenceBackend,
    &kScalarBackend,
#ifdef OSCAR_X86
    &kAvx2Backend,
    &kAvx512VnniBackend,
#endif
#ifdef OSCAR_ARM64
    &kNeonBackend,
#endif
};
// clang-format on

std::atomic<const BackendOps*> chosen{nullptr};

std::string names_of_available() {
  std::string names;
  for (const std::string_view name : available_backends()) {
    if (!names.empty()) names += ", ";
    names += name;
  }
  return names;
}

Status find_backend(std::string_view argument, std::string_view name, const BackendOps*& found) {
  for (const BackendOps* backend : kBackends) {
    if (!backend->available()) continue;
    if (name == "auto" || name == backend->name) found = backend;
  }
  if (found != nullptr) return {};
  return {StatusCode::kInvalidArgument, std::string(argument) + " is '" + std::string(name) +
                                            "', this machine has: " + names_of_available()};
}

}  // namespace

Status choose_backend(const BackendOps*& backend) {
  backend = chosen.load(std::memory_order_acquire);
  if (backend != nullptr) return {};
  const char* wanted = std::getenv("OSCAR_BACKEND");
  const bool set = wanted != nullptr && *wanted != '\0';
  OSCAR_TRY(find_backend("OSCAR_BACKEND", set ? wanted : "auto", backend));
  chosen.store(backend, std::memory_order_release);
  return {};
}

std::vector<std::string_view> available_backends() {
  std::vector<std::string_view> names;
  for (const BackendOps* backend : kBackends) {
    if (backend->available()) names.push_back(backend->name);
  }
  return names;
}

Status active_backend(std::string_view& name) {
  const BackendOps* backend = nullptr;
  OSCAR_TRY(choose_backend(backend));
  name = backend->name;
  return {};
}

Status set_backend(std::string_view name) {
  if (name == "auto") {
    chosen.store(nullptr, std::memory_order_release);
    return {};
  }
  const BackendOps* backend = nullptr;
  OSCAR_TRY(find_backend("backend", name, backend));
  chosen.store(backend, std::memory_order_release);
  return {};
}

const char* version() { return OSCAR_VERSION; }

}  // namespace oscar
