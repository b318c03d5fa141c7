// The Python module transfuse._C: one m.def per launcher, and what `transfuse doctor` asks. Nothing else.
#include <cuda_runtime_api.h>

#include "launchers.h"
#include "tensor_caster.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

// 13000 is CUDA 13.0. Both calls create no context; the driver's is 0 where there is no driver.
int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

py::dict dtypes() {
  py::dict numbers;
  for (int i = 0; i < transfuse::kDTypes; ++i) numbers[transfuse::kDTypeNames[i]] = i;
  return numbers;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  // A launch may wait for a full queue or a first-use compilation: other Python threads go on meanwhile.
  using released = py::call_guard<py::gil_scoped_release>;

  m.attr("__version__") = TRANSFUSE_VERSION;
  m.attr("arch_list") = TRANSFUSE_ARCH_LIST;
  m.attr("dtypes") = dtypes();
  m.def("runtime_version", &runtime_version);
  m.def("driver_version", &driver_version);

  m.def("layer_norm_forward", &transfuse::layer_norm_forward, "x"_a, "residual"_a, "weight"_a, "bias"_a, "y"_a,
        "summed"_a, "mean"_a, "rstd"_a, "eps"_a, "target"_a, released());
  m.def("rms_norm_forward", &transfuse::rms_norm_forward, "x"_a, "residual"_a, "weight"_a, "y"_a, "summed"_a, "rstd"_a,
        "eps"_a, "target"_a, released());
  m.def("layer_norm_backward", &transfuse::layer_norm_backward, "dout"_a, "dsummed"_a, "summed"_a, "weight"_a,
        "mean"_a, "rstd"_a, "dx"_a, "dweight"_a, "dbias"_a, "target"_a, released());
  m.def("rms_norm_backward", &transfuse::rms_norm_backward, "dout"_a, "dsummed"_a, "summed"_a, "weight"_a, "rstd"_a,
        "dx"_a, "dweight"_a, "target"_a, released());
  m.def("norm_weight_sums", &transfuse::norm_weight_sums, "dweight_partial"_a, "dbias_partial"_a, "dweight"_a,
        "dbias"_a, "target"_a, released());
  m.def("causal_softmax_forward", &transfuse::causal_softmax_forward, "scores"_a, "mask"_a, "bias"_a, "out"_a,
        "scale"_a, "query"_a, "diagonal"_a, "target"_a, released());
  m.def("causal_softmax_backward", &transfuse::causal_softmax_backward, "dout"_a, "out"_a, "dscores"_a, "sums"_a,
        "group_dims"_a, "members_a_chunk"_a, "scale"_a, "query"_a, "diagonal"_a, "target"_a, released());
  m.def("attention_forward", &transfuse::attention_forward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "mask"_a, "bias"_a,
        "slopes"_a, "sinks"_a, "q_starts"_a, "k_starts"_a, "k_lengths"_a, "seed"_a, "max_q"_a, "max_k"_a, "scale"_a,
        "left"_a, "right"_a, "first"_a, "softcap"_a, "dropout_p"_a, "target"_a, released());
  m.def("attention_backward", &transfuse::attention_backward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dout"_a, "dlse"_a,
        "statistics"_a, "dq"_a, "dk"_a, "dv"_a, "dbias"_a, "dbias_partial"_a, "dslopes"_a, "dsinks"_a, "mask"_a,
        "bias"_a, "slopes"_a, "sinks"_a, "q_starts"_a, "k_starts"_a, "k_lengths"_a, "seed"_a, "max_q"_a, "max_k"_a,
        "scale"_a, "left"_a, "right"_a, "first"_a, "softcap"_a, "dropout_p"_a, "target"_a, released());
  m.def("attention_decode", &transfuse::attention_decode, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "partial_out"_a,
        "partial_highest"_a, "partial_totals"_a, "mask"_a, "bias"_a, "slopes"_a, "sinks"_a, "q_starts"_a, "k_starts"_a,
        "k_lengths"_a, "seed"_a, "max_q"_a, "max_k"_a, "scale"_a, "left"_a, "right"_a, "first"_a, "softcap"_a,
        "dropout_p"_a, "target"_a, released());
  m.def("attention_weights", &transfuse::attention_weights, "q"_a, "k"_a, "lse"_a, "weights"_a, "mask"_a, "bias"_a,
        "slopes"_a, "sinks"_a, "q_starts"_a, "k_starts"_a, "k_lengths"_a, "seed"_a, "max_q"_a, "max_k"_a, "scale"_a,
        "left"_a, "right"_a, "first"_a, "softcap"_a, "dropout_p"_a, "target"_a, released());
  m.def("rotary_append", &transfuse::rotary_append, "q"_a, "k"_a, "v"_a, "cos"_a, "sin"_a, "q_out"_a, "k_out"_a,
        "v_out"_a, "starts"_a, "start"_a, "inverse"_a, "target"_a, released());
  m.def("ffn_product", &transfuse::ffn_product, "layout"_a, "tile"_a, "splits"_a, "a"_a, "b"_a, "b_gate"_a, "a2"_a,
        "b2"_a, "partials"_a, "out"_a, "bias"_a, "up"_a, "gate"_a, "dgate"_a, "hidden"_a, "sums"_a, "seed"_a,
        "activation"_a, "backward"_a, "dropout_p"_a, "target"_a, released());
  m.def("ffn_combine", &transfuse::ffn_combine, "c"_a, "g"_a, "rows_a_block"_a, "out"_a, "bias"_a, "up"_a, "gate"_a,
        "dgate"_a, "hidden"_a, "sums"_a, "seed"_a, "activation"_a, "backward"_a, "dropout_p"_a, "target"_a,
        released());
}
