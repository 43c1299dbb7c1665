#!/usr/bin/env bash
# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
#
# ensure_arm64.sh: installs what builds and runs the arm64 tests on another machine: a cross compiler
# with its C library and OpenMP, qemu-user, and GoogleTest's sources to be built with that compiler.
set -euo pipefail
packages=(g++-aarch64-linux-gnu qemu-user googletest)

found() {
  command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null &&
    [[ -f /usr/aarch64-linux-gnu/lib/ld-linux-aarch64.so.1 ]] &&
    [[ -f /usr/src/googletest/googletest/src/gtest-all.cc ]]
}

install_packages() {
  command -v apt-get >/dev/null || return 1
  local sudo=()
  if [[ $(id -u) -ne 0 ]]; then
    command -v sudo >/dev/null || return 1
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get install -y "${packages[@]}" ||
    { "${sudo[@]}" apt-get update && "${sudo[@]}" apt-get install -y "${packages[@]}"; }
}

found && exit 0
echo "The arm64 tools are missing: installing ${packages[*]}"
if ! install_packages || ! found; then
  echo "error: 'apt-get install ${packages[*]}' did not give aarch64-linux-gnu-g++, qemu-aarch64," >&2
  echo "/usr/aarch64-linux-gnu and /usr/src/googletest. Install them, then run 'make test-arm64' again." >&2
  exit 1
fi
