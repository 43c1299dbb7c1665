// SPDX-FileCopyrightText: 2026 The oscar-kv authors
// SPDX-License-Identifier: Apache-2.0
#include "argument.hpp"

namespace oscar::python {
namespace {

constexpr std::uint32_t kMajor = 1;

// As DLPack 1.3 lays it out (DLPackExchangeAPI in dlpack.h).
struct ExchangeApi {
  std::uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*tensor_from_object)(void* object, nb::dlpack::dltensor* out);  // may be null
  void* current_stream;
};

// Of the type itself: what derives from torch.Tensor may stand for other data than it holds.
const ExchangeApi* published_by(PyTypeObject* type) noexcept {
  if (!PyType_HasFeature(type, Py_TPFLAGS_HEAPTYPE) || type->tp_dict == nullptr) return nullptr;
  PyObject* capsule = PyDict_GetItemString(type->tp_dict, "__dlpack_c_exchange_api__");
  if (capsule == nullptr || !PyCapsule_IsValid(capsule, "dlpack_exchange_api")) return nullptr;
  const auto* api =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  return api->major == kMajor && api->tensor_from_object != nullptr ? api : nullptr;
}

struct Known {
  PyTypeObject* type = nullptr;
  const ExchangeApi* api = nullptr;
};
thread_local Known known;  // the type met last that has one; it is kept alive

}  // namespace

bool borrow_tensor(PyObject* object, nb::dlpack::dltensor& view) noexcept {
  PyTypeObject* type = Py_TYPE(object);
  if (type != known.type) {
    const ExchangeApi* api = published_by(type);
    if (api == nullptr) return false;
    Py_INCREF(type);
    known = {type, api};
  }
  if (known.api->tensor_from_object(object, &view) == 0) return true;
  PyErr_Clear();  // the slow way says what is wrong with it
  return false;
}

}  // namespace oscar::python
