// How a TensorView crosses from Python: as the tuple (data_ptr, dtype number, sizes, strides) that
// transfuse._extension.view builds. Read with the C API directly: some 100 ns a tensor.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launch.h"
#include "tensor.h"

namespace pybind11::detail {

template <>
struct type_caster<transfuse::TensorView> {
  PYBIND11_TYPE_CASTER(transfuse::TensorView, const_name("tuple[int, int, tuple[int, ...], tuple[int, ...]]"));

  bool load(handle source, bool) {
    PyObject* tuple = source.ptr();
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 4) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 0));
    const long dtype = PyLong_AsLong(PyTuple_GET_ITEM(tuple, 1));
    PyObject* sizes = PyTuple_GET_ITEM(tuple, 2);
    PyObject* strides = PyTuple_GET_ITEM(tuple, 3);
    if (PyErr_Occurred() || dtype < 0 || dtype >= transfuse::kDTypes || !PyTuple_Check(sizes) ||
        !PyTuple_Check(strides)) {
      PyErr_Clear();
      return false;
    }
    const Py_ssize_t ndim = PyTuple_GET_SIZE(sizes);
    if (ndim > transfuse::TensorView::kMaxDims || PyTuple_GET_SIZE(strides) != ndim) return false;
    value.dtype = static_cast<transfuse::DType>(dtype);
    value.ndim = static_cast<int>(ndim);
    for (Py_ssize_t d = 0; d < ndim; ++d) {
      value.sizes[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, d));
      value.strides[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, d));
    }
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
};

// (device index, stream handle)
template <>
struct type_caster<transfuse::LaunchTarget> {
  PYBIND11_TYPE_CASTER(transfuse::LaunchTarget, const_name("tuple[int, int]"));

  bool load(handle source, bool) {
    PyObject* tuple = source.ptr();
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 2) return false;
    value.device = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(tuple, 0)));
    value.stream = static_cast<cudaStream_t>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 1)));
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
};

}  // namespace pybind11::detail
