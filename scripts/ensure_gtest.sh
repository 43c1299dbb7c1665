#!/usr/bin/env bash
# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
#
# ensure_gtest.sh CMAKE: installs GoogleTest with the system's package manager unless CMake finds it.
set -euo pipefail
cmake=$1
probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
cat >"$probe/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.24)
project(probe CXX)
find_package(GTest REQUIRED)
END

found() { "$cmake" -S "$probe" -B "$probe/build" >"$probe/log" 2>&1; }

install_package() {
  command -v apt-get >/dev/null || return 1
  local sudo=()
  if [[ $(id -u) -ne 0 ]]; then
    command -v sudo >/dev/null || return 1
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get install -y libgtest-dev ||
    { "${sudo[@]}" apt-get update && "${sudo[@]}" apt-get install -y libgtest-dev; }
}

found && exit 0
echo "GoogleTest is missing: installing libgtest-dev"
if ! install_package || ! found; then
  tail -n 20 "$probe/log" >&2
  echo "error: CMake finds no GoogleTest and 'apt-get install libgtest-dev' did not help." >&2
  echo "Install GoogleTest with its CMake files (GTestConfig.cmake), then run 'make test' again." >&2
  exit 1
fi
