// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "arrays.hpp"

#include <cstdint>
#include <type_traits>
#include <vector>

#include "core/check.hpp"

namespace oscar::python {
namespace {

std::string text(const nb::dlpack::dtype& dtype) {
  const auto code = static_cast<nb::dlpack::dtype_code>(dtype.code);
  const char* family = code == nb::dlpack::dtype_code::Int      ? "int"
                       : code == nb::dlpack::dtype_code::UInt   ? "uint"
                       : code == nb::dlpack::dtype_code::Float  ? "float"
                       : code == nb::dlpack::dtype_code::Bfloat ? "bfloat"
                       : code == nb::dlpack::dtype_code::Bool   ? "bool"
                                                                : "dtype";
  return family + std::to_string(dtype.bits);
}

template <typename AnyArray>
std::string shape_text(const AnyArray& array) {
  std::string result = "[";
  for (std::size_t i = 0; i < array.ndim(); ++i) {
    result += (i == 0 ? "" : ", ") + std::to_string(array.shape(i));
  }
  return result + "]";
}

std::string shape_text(std::initializer_list<std::int64_t> shape) {
  std::string result = "[";
  for (const std::int64_t extent : shape) {
    if (result.size() > 1) result += ", ";
    result += extent < 0 ? "any" : std::to_string(extent);
  }
  return result + "]";
}

std::string device_text(Device device) {
  if (device.is_cpu()) return "the CPU";
  if (device.type == nb::device::cuda::value) return "CUDA device " + std::to_string(device.id);
  return "DLPack device type " + std::to_string(device.type);
}

template <typename AnyArray>
void require(const char* name, const AnyArray& array, Device device, const nb::dlpack::dtype& dtype,
             std::initializer_list<std::int64_t> shape, bool strided = false) {
  require_device(name, device_of(array), device);
  if (array.dtype() != dtype) {
    throw nb::type_error(
        (std::string(name) + " has dtype " + text(array.dtype()) + ", must be " + text(dtype))
            .c_str());
  }
  bool fits = array.ndim() == shape.size();
  for (std::size_t i = 0; fits && i < shape.size(); ++i) {
    const std::int64_t extent = shape.begin()[i];
    fits = extent < 0 || static_cast<std::int64_t>(array.shape(i)) == extent;
  }
  if (!fits) {
    throw nb::value_error(
        (std::string(name) + " has shape " + shape_text(array) + ", must be " + shape_text(shape))
            .c_str());
  }
  std::int64_t stride = 1;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    if (strided && i == 0) break;
    if (array.shape(i) > 1 && array.stride(i) != stride) {
      throw nb::value_error((std::string(name) + " has stride " + std::to_string(array.stride(i)) +
                             " in dimension " + std::to_string(i) + ", must be contiguous (" +
                             std::to_string(stride) + ")")
                                .c_str());
    }
    stride *= static_cast<std::int64_t>(array.shape(i));
  }
}

template <typename T, typename AnyArray>
T* contiguous(const char* name, const AnyArray& array, Device device,
              std::initializer_list<std::int64_t> shape) {
  require(name, array, device, nb::dtype<std::remove_const_t<T>>(), shape);
  return static_cast<T*>(array.data());
}

template <typename Rows, typename AnyArray>
Rows rows(const char* name, const AnyArray& array, Device device, std::int64_t head_dim) {
  require_device(name, device_of(array), device);
  const DType dtype = row_dtype(name, array.dtype());
  if (array.ndim() != 3 || static_cast<std::int64_t>(array.shape(2)) != head_dim) {
    throw nb::value_error((std::string(name) + " has shape " + shape_text(array) +
                           ", must be [tokens, heads, " + std::to_string(head_dim) + "]")
                              .c_str());
  }
  if (array.stride(2) != 1) {
    throw nb::value_error((std::string(name) + " has stride " + std::to_string(array.stride(2)) +
                           " in head_dim, must be 1")
                              .c_str());
  }
  return {array.data(),
          dtype,
          static_cast<std::int64_t>(array.shape(0)),
          static_cast<std::int32_t>(array.shape(1)),
          array.stride(0),
          array.stride(1)};
}

// What the sequences of a batch, and the heads of the layer, have besides pages and exact rows.
void take_sequences(const CacheArrays& arrays, CacheArguments& arguments) {
  const Layout& layout = arguments.layout;
  const Device device = arguments.device;
  CacheView& view = arguments.view;
  arguments.batch = batch_of(arrays);
  view.slot =
      layout.exact_blocks == 1
          ? contiguous<const std::int32_t>("slot", arrays.slot, device, {-1})
          : contiguous<const std::int32_t>("slot", arrays.slot, device, {-1, layout.exact_blocks});
  view.seq_len =
      contiguous<const std::int32_t>("seq_len", arrays.seq_len, device, {arguments.batch});
  view.block_table = contiguous<const std::int32_t>("block_table", arrays.block_table, device,
                                                    {arguments.batch, -1});
  view.max_pages = static_cast<std::int64_t>(arrays.block_table.shape(1));
  if (arrays.exact_from) {
    view.exact_from =
        contiguous<const std::int32_t>("exact_from", *arrays.exact_from, device, {arguments.batch});
  }
  if (arrays.balance) {
    view.balance = contiguous<const float>("balance", *arrays.balance, device,
                                           {layout.kv_heads, layout.head_dim});
  }
  if (arrays.center) {
    view.center = contiguous<const float>("center", *arrays.center, device,
                                          {layout.kv_heads, layout.head_dim});
  }
  if (arrays.feedback) {
    const nb::dlpack::dtype half{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    require("feedback", *arrays.feedback, device, half,
            {layout.kv_heads, layout.head_dim, layout.head_dim});
    view.feedback = static_cast<const std::uint16_t*>(arrays.feedback->data());
  }
}

}  // namespace

void require_device(const char* name, Device found, Device device) {
  if (found == device) return;
  throw nb::type_error(
      (std::string(name) + " is on " + device_text(found) + ", must be on " + device_text(device))
          .c_str());
}

void raise(const Status& status) {
  const char* message = status.message().c_str();
  switch (status.code()) {
    case StatusCode::kOutOfRange:
      throw nb::index_error(message);
    case StatusCode::kWrongType:
      throw nb::type_error(message);
    case StatusCode::kUnsupported:
      PyErr_SetString(PyExc_NotImplementedError, message);
      throw nb::python_error();
    case StatusCode::kDeviceError:
      PyErr_SetString(PyExc_RuntimeError, message);
      throw nb::python_error();
    default:
      throw nb::value_error(message);
  }
}

Format parse_format(const std::string& name) {
  for (const Format format : kFormats) {
    if (name == name_of(format)) return format;
  }
  throw nb::value_error(("format is '" + name + "', must be k2v2, k4v2 or k4v4").c_str());
}

DType row_dtype(const char* name, const nb::dlpack::dtype& dtype) {
  if (dtype == nb::dtype<float>()) return DType::kF32;
  const auto code = static_cast<nb::dlpack::dtype_code>(dtype.code);
  if (dtype.bits == 16 && dtype.lanes == 1) {
    if (code == nb::dlpack::dtype_code::Bfloat) return DType::kBF16;
    if (code == nb::dlpack::dtype_code::Float) return DType::kF16;
  }
  throw nb::type_error(
      (std::string(name) + " has dtype " + text(dtype) + ", must be float32, float16 or bfloat16")
          .c_str());
}

ConstRows const_rows(const char* name, const ConstArgument& array, Device device,
                     std::int64_t head_dim) {
  return rows<ConstRows>(name, array, device, head_dim);
}

MutableRows mutable_rows(const char* name, const MutableArgument& array, Device device,
                         std::int64_t head_dim) {
  return rows<MutableRows>(name, array, device, head_dim);
}

const std::int32_t* i32(const char* name, const ConstArgument& array, Device device,
                        std::initializer_list<std::int64_t> shape) {
  return contiguous<const std::int32_t>(name, array, device, shape);
}

const float* f32(const char* name, const ConstArgument& array, Device device,
                 std::initializer_list<std::int64_t> shape) {
  return contiguous<const float>(name, array, device, shape);
}

float* f32(const char* name, const MutableArgument& array, Device device,
           std::initializer_list<std::int64_t> shape) {
  return contiguous<float>(name, array, device, shape);
}

std::int32_t batch_of(const CacheArrays& arrays) {
  return arrays.slot.ndim() == 0 ? 0 : static_cast<std::int32_t>(arrays.slot.shape(0));
}

CacheArguments cache_arguments(const CacheArrays& arrays, const std::string& format,
                               std::int32_t window, std::int32_t sinks) {
  CacheArguments result;
  Layout& layout = result.layout;
  layout.format = parse_format(format);
  layout.window = window;
  layout.sinks = sinks;
  if (arrays.pages.ndim() != 4 || arrays.exact.ndim() != 5) {
    throw nb::value_error(
        ("pages has shape " + shape_text(arrays.pages) + " and exact " + shape_text(arrays.exact) +
         ", must be [num_pages, kv_heads, tiles_per_page, tile_bytes] and [slots, 2, kv_heads, "
         "ring_tokens + sinks, head_dim]")
            .c_str());
  }
  const auto exact_rows = static_cast<std::int64_t>(arrays.exact.shape(3));
  layout.exact_blocks = arrays.exact.shape(1) != 1 ? 1 : exact_rows == layout.exact_rows() ? 2 : 4;
  layout.kv_heads = static_cast<std::int32_t>(arrays.pages.shape(1));
  layout.page_tokens = static_cast<std::int32_t>(arrays.pages.shape(2)) * kTileTokens;
  layout.head_dim = static_cast<std::int32_t>(arrays.exact.shape(4));
  layout.exact_dtype = row_dtype("exact", arrays.exact.dtype());
  check(check_layout(layout));
  const Device device = result.device = device_of(arrays.pages);
  if (!device.is_cpu() && device.type != nb::device::cuda::value) {
    throw nb::type_error(
        ("pages is on " + device_text(device) + ", must be on the CPU or a CUDA device").c_str());
  }
  require("pages", arrays.pages, device, nb::dtype<std::uint8_t>(),
          {-1, layout.kv_heads, layout.tiles_per_page(), layout.tile().tile_bytes()});
  require("exact", arrays.exact, device, arrays.exact.dtype(),
          {-1, layout.exact_blocks == 1 ? 2 : 1, layout.kv_heads, layout.exact_block_rows(),
           layout.head_dim},
          true);

  CacheView& view = result.view;
  view.pages = static_cast<std::uint8_t*>(const_cast<void*>(arrays.pages.data()));
  view.num_pages = static_cast<std::int64_t>(arrays.pages.shape(0));
  view.exact = const_cast<void*>(arrays.exact.data());
  view.slots = static_cast<std::int64_t>(arrays.exact.shape(0));
  if (view.slots > 1) {
    view.exact_stride =
        arrays.exact.stride(0) * static_cast<std::int64_t>(size_of(layout.exact_dtype));
    if (view.exact_stride < layout.exact_block_bytes()) {
      throw nb::value_error(("exact has stride " + std::to_string(arrays.exact.stride(0)) +
                             " between slots: they overlap")
                                .c_str());
    }
  }
  take_sequences(arrays, result);
  return result;
}

}  // namespace oscar::python
