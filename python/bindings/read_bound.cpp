// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "read_bound.hpp"

#include <cstdint>
#include <cstring>

namespace oscar::python {

std::uint64_t read_bytes(const Array& array) {
  constexpr std::int64_t kLine = 64;
  constexpr std::int64_t kBlock = 64 * kLine;
  const auto* bytes = static_cast<const std::uint8_t*>(array.data());
  const auto blocks = static_cast<std::int64_t>(array.nbytes()) / kBlock;
  std::uint64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
  for (std::int64_t block = 0; block < blocks; ++block) {
    std::uint64_t lanes[8] = {};
    for (std::int64_t line = 0; line < kBlock; line += kLine) {
      std::uint64_t words[8];
      std::memcpy(words, bytes + block * kBlock + line, kLine);
      for (int i = 0; i < 8; ++i) lanes[i] += words[i];
    }
    for (const std::uint64_t lane : lanes) total += lane;
  }
  return total;
}

}  // namespace oscar::python
