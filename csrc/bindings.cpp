// Registers the compiled operations with torch.library, so that autograd and torch.compile see them. megagap/ops/ says
// what each means and adds the backward formulas and the shapes; csrc/gpu/bindings.cpp registers the GPU's.
#include <Python.h>
#include <torch/library.h>

#include "cpu/ops.h"

TORCH_LIBRARY(megagap, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float gain_scale) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float gain_scale) -> (Tensor, Tensor)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float gain_scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_rms_norm_backward(Tensor grad, Tensor grad_total, Tensor total, Tensor weight, Tensor rstd, float gain_scale)"
      " -> (Tensor, Tensor)");
  m.def(
      "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool backward)"
      " -> (Tensor, Tensor)");
  m.def(
      "rotary_(Tensor(a!) packed, Tensor cos, Tensor sin, Tensor? positions, int heads, bool interleaved,"
      " bool backward) -> ()");
  m.def(
      "rotary_pack(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? positions, bool interleaved,"
      " bool backward) -> Tensor");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> Tensor");
  m.def("cross_entropy_rows(Tensor logits, Tensor targets, int first) -> Tensor");
  m.def(
      "cross_entropy_rows_gradient_(Tensor(a!) logits, Tensor targets, int first, Tensor statistics, Tensor scale,"
      " float z_loss) -> ()");
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor scale, float z_loss) -> Tensor");
  m.def(
      "adamw_(Tensor(a!) parameter, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor grad_scale,"
      " Tensor found_inf, Tensor step, float lr, float beta1, float beta2, float eps, float weight_decay,"
      " int[]? rounding, Tensor(d!)? remainder=None) -> ()");
}

TORCH_LIBRARY_IMPL(megagap, CPU, m) {
  m.impl("rms_norm", &megagap::cpu::rms_norm);
  m.impl("rms_norm_backward", &megagap::cpu::rms_norm_backward);
  m.impl("add_rms_norm", &megagap::cpu::add_rms_norm);
  m.impl("add_rms_norm_backward", &megagap::cpu::add_rms_norm_backward);
  m.impl("rotary", &megagap::cpu::rotary);
  m.impl("rotary_", &megagap::cpu::rotary_);
  m.impl("rotary_pack", &megagap::cpu::rotary_pack);
  m.impl("swiglu", &megagap::cpu::swiglu);
  m.impl("swiglu_backward", &megagap::cpu::swiglu_backward);
  m.impl("cross_entropy_rows", &megagap::cpu::cross_entropy_rows);
  m.impl("cross_entropy_rows_gradient_", &megagap::cpu::cross_entropy_rows_gradient_);
  m.impl("cross_entropy_", &megagap::cpu::cross_entropy_);
  m.impl("adamw_", &megagap::cpu::adamw_);
}

// An empty Python module: importing it loads the library and with it the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
