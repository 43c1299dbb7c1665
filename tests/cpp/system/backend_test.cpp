// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "oscar/backend.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "core/calls.hpp"

namespace oscar {
namespace {

std::string active() {
  std::string_view name;
  const Status status = active_backend(name);
  return status.ok() ? std::string(name) : "error: " + status.message();
}

// The choice is made at the first call: a process of its own for every value of OSCAR_BACKEND.
class BackendDeathTest : public ::testing::Test {
 protected:
  // An emulated process cannot start its own program again; there the copy of a process that ctest
  // has just started has to do.
#ifdef OSCAR_TEST_EMULATED
  void SetUp() override { ::testing::FLAGS_gtest_death_test_style = "fast"; }
#else
  void SetUp() override { ::testing::FLAGS_gtest_death_test_style = "threadsafe"; }
#endif
};

[[noreturn]] void print_active(const char* wanted) {
  setenv("OSCAR_BACKEND", wanted, 1);
  std::fprintf(stderr, "active: %s.\n", active().c_str());
  std::exit(0);
}

TEST_F(BackendDeathTest, EnvironmentDecides) {
  for (const std::string_view name : available_backends()) {
    const std::string wanted(name);
    EXPECT_EXIT(print_active(wanted.c_str()), ::testing::ExitedWithCode(0),
                "active: " + wanted + "\\.");
  }
}

TEST_F(BackendDeathTest, EmptyEnvironmentIsAuto) {
  EXPECT_EXIT(print_active(""), ::testing::ExitedWithCode(0),
              "active: " + std::string(available_backends().back()) + "\\.");
}

TEST_F(BackendDeathTest, UnknownEnvironmentIsRefused) {
  EXPECT_EXIT(print_active("fastest"), ::testing::ExitedWithCode(0),
              "active: error: OSCAR_BACKEND is 'fastest'.*reference");
}

TEST(Backend, ReferenceAndScalarAreAlwaysThere) {
  const auto names = available_backends();
  ASSERT_GE(names.size(), 2u);
  EXPECT_EQ(names[0], "reference");
  EXPECT_EQ(names[1], "scalar");
}

TEST(Backend, SetBackendTakesEffect) {
  for (const std::string_view name : available_backends()) {
    ASSERT_TRUE(set_backend(name).ok());
    EXPECT_EQ(active(), name);
  }
  ASSERT_TRUE(set_backend("auto").ok());
}

TEST(Backend, UnknownNameChangesNothing) {
  ASSERT_TRUE(set_backend("reference").ok());
  for (const char* name : {"", "gpu", "Reference", "avx"}) {
    const Status status = set_backend(name);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find("scalar"), std::string::npos) << status.message();
    EXPECT_EQ(active(), "reference");
  }
  ASSERT_TRUE(set_backend("auto").ok());
}

TEST(Backend, VersionIsSet) { EXPECT_STRNE(version(), ""); }

}  // namespace
}  // namespace oscar
