// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// DLPack arrays in, the library's views out. Every mismatch is a Python exception that names the
// argument, its value and what it must be: TypeError for dtypes and devices, ValueError for shapes
// and strides.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "argument.hpp"
#include "oscar/cache.hpp"
#include "oscar/status.hpp"
#include "oscar/tensor.hpp"

namespace oscar::python {

using Array = nb::ndarray<nb::ro>;  // kept beyond a call
using OptionalArray = std::optional<Array>;
using MutableArray = nb::ndarray<>;
using ConstArgument = Argument<false>;
using MutableArgument = Argument<true>;

[[noreturn]] void raise(const Status& status);
inline void check(const Status& status) {
  if (!status.ok()) raise(status);
}

Format parse_format(const std::string& name);

// Any of the three row dtypes.
DType row_dtype(const char* name, const nb::dlpack::dtype& dtype);

// The CPU or one CUDA device, as DLPack numbers them. All arrays of a call are on one.
struct Device {
  std::int32_t type = nb::device::cpu::value;
  std::int32_t id = 0;
  [[nodiscard]] bool is_cpu() const { return type == nb::device::cpu::value; }
  friend bool operator==(const Device&, const Device&) = default;
};
inline constexpr Device kCpu;

template <typename AnyArray>
Device device_of(const AnyArray& array) {
  return {array.device_type(),
          array.device_type() == nb::device::cpu::value ? 0 : array.device_id()};
}

// [tokens, heads, head_dim] with head_dim contiguous.
ConstRows const_rows(const char* name, const ConstArgument& array, Device device,
                     std::int64_t head_dim);
MutableRows mutable_rows(const char* name, const MutableArgument& array, Device device,
                         std::int64_t head_dim);

// A contiguous array of exactly this dtype and shape; -1 in `shape` takes any extent.
const std::int32_t* i32(const char* name, const ConstArgument& array, Device device,
                        std::initializer_list<std::int64_t> shape);
const float* f32(const char* name, const ConstArgument& array, Device device,
                 std::initializer_list<std::int64_t> shape);
float* f32(const char* name, const MutableArgument& array, Device device,
           std::initializer_list<std::int64_t> shape);

// TypeError unless an array, which is on `found`, is on `device`.
void require_device(const char* name, Device found, Device device);

// The arrays of one layer, and what they say about the layout.
struct CacheArrays {
  Array pages;               // u8 [num_pages, kv_heads, tiles_per_page, tile_bytes]
  Array exact;               // [slots, 2, kv_heads, ring_tokens + sinks, head_dim], slots strided;
                             // of 2 or 4 exact blocks [slots, 1, kv_heads, their rows, head_dim]
  Array block_table;         // i32 [batch, max_pages]
  Array slot;                // i32 [batch], of 2 or 4 exact blocks [batch, exact blocks]
  Array seq_len;             // i32 [batch]
  OptionalArray exact_from;  // i32 [batch]
  OptionalArray balance;     // f32 [kv_heads, head_dim]
  OptionalArray feedback;    // f16 [kv_heads, head_dim, head_dim]
  OptionalArray center;      // f32 [kv_heads, head_dim]
};

// Sequences, as `slot` says.
std::int32_t batch_of(const CacheArrays& arrays);

struct CacheArguments {
  Layout layout;
  CacheView view;
  std::int32_t batch = 0;
  Device device;  // that of pages
};
CacheArguments cache_arguments(const CacheArrays& arrays, const std::string& format,
                               std::int32_t window, std::int32_t sinks);

}  // namespace oscar::python
