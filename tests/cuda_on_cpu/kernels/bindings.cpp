// The module that tests/test_cuda_on_cpu.py builds beside the extension's.
#include "planted.h"
#include "tensor_caster.h"

namespace py = pybind11;

PYBIND11_MODULE(_planted, m, py::mod_gil_not_used()) {
  using released = py::call_guard<py::gil_scoped_release>;
  m.def("run", &planted::run, released());
  m.def("run_rows", &planted::run_rows, released());
  m.def("run_workspace", &planted::run_workspace, released());
  m.def("run_unlisted", &planted::run_unlisted, released());
  m.def("convert", &planted::convert, released());
  m.def("shuffles", &planted::shuffles, released());
  m.def("votes", &planted::votes, released());
  m.def("mma", &planted::run_mma, released());
  m.def("ldmatrix", &planted::run_ldmatrix, released());
  m.def("barriers", &planted::barriers, released());
  m.def("copies", &planted::copies, released());
}
