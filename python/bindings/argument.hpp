// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
//
// An array argument of one call. nb::ndarray takes any DLPack array by a Python method of the
// array, about 2 us; a decode step passes ten a layer. Types that publish DLPack's C functions
// (__dlpack_c_exchange_api__: torch.Tensor from 2.10 on) are read through these in 0.1 us.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace oscar::python {

namespace nb = nanobind;

// Fills `view` and returns true if the type of `object` itself publishes the functions. Nothing is
// kept alive: the caller of a binding holds its arguments.
bool borrow_tensor(PyObject* object, nb::dlpack::dltensor& view) noexcept;

// The part of nb::ndarray's interface that the checks need.
template <bool kMutable>
class Argument {
 public:
  using Any = std::conditional_t<kMutable, nb::ndarray<>, nb::ndarray<nb::ro>>;
  static constexpr std::size_t kMostDimensions = 8;

  bool take(nb::handle source, std::uint8_t flags, nb::detail::cleanup_list* cleanup) noexcept {
    nb::dlpack::dltensor view;
    if (borrow_tensor(source.ptr(), view)) return describe(view);
    nb::detail::make_caster<Any> caster;
    if (!caster.from_python(source, flags, cleanup)) return false;
    kept_ = caster.value;
    view.data = const_cast<void*>(static_cast<const void*>(kept_.data()));
    view.device = {kept_.device_type(), kept_.device_id()};
    view.ndim = static_cast<std::int32_t>(kept_.ndim());
    view.dtype = kept_.dtype();
    view.shape = const_cast<std::int64_t*>(kept_.shape_ptr());
    view.strides = const_cast<std::int64_t*>(kept_.stride_ptr());
    return describe(view);
  }

  [[nodiscard]] std::size_t ndim() const { return ndim_; }
  [[nodiscard]] std::size_t shape(std::size_t i) const {
    return static_cast<std::size_t>(shape_[i]);
  }
  [[nodiscard]] std::int64_t stride(std::size_t i) const { return stride_[i]; }
  [[nodiscard]] nb::dlpack::dtype dtype() const { return dtype_; }
  [[nodiscard]] int device_type() const { return device_.device_type; }
  [[nodiscard]] int device_id() const { return device_.device_id; }
  [[nodiscard]] std::conditional_t<kMutable, void*, const void*> data() const { return data_; }
  [[nodiscard]] std::size_t nbytes() const {
    std::size_t bytes = dtype_.bits / 8;
    for (std::size_t i = 0; i < ndim_; ++i) bytes *= shape(i);
    return bytes;
  }

 private:
  bool describe(const nb::dlpack::dltensor& view) noexcept {
    ndim_ = static_cast<std::size_t>(view.ndim);
    if (view.ndim < 0 || ndim_ > kMostDimensions) return false;
    if (ndim_ > 0 && view.strides == nullptr) return false;
    for (std::size_t i = 0; i < ndim_; ++i) {
      shape_[i] = view.shape[i];
      stride_[i] = view.strides[i];
    }
    data_ = static_cast<std::byte*>(view.data) + view.byte_offset;
    device_ = view.device;
    dtype_ = view.dtype;
    return true;
  }

  std::size_t ndim_ = 0;
  std::array<std::int64_t, kMostDimensions> shape_{}, stride_{};
  void* data_ = nullptr;
  nb::dlpack::device device_{};
  nb::dlpack::dtype dtype_{};
  Any kept_;  // of an array that was not borrowed
};

}  // namespace oscar::python

template <bool kMutable>
struct nanobind::detail::type_caster<oscar::python::Argument<kMutable>> {
  NB_TYPE_CASTER(oscar::python::Argument<kMutable>, const_name("ArrayLike"))

  bool from_python(handle source, std::uint8_t flags, cleanup_list* cleanup) noexcept {
    return value.take(source, flags, cleanup);
  }
};
