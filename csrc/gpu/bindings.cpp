// Calls the GPU kernels with tensors and registers them for the operations that csrc/bindings.cpp declares.
//
// No header of CUDA or HIP is needed, so the same file serves both (torch calls its ROCm devices CUDA) and is itself
// tested on CPU tensors, with the kernels of the CPU shim (MEGAGAP_SHIM).
#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "gpu/kernels.h"

#if !defined(MEGAGAP_SHIM)
// Part of torch's stable C interface since 2.6, in CUDA and ROCm builds alike. Its header declares it for CUDA only.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace megagap::gpu {
namespace {

using at::Tensor;

// The device of the tensors for the launches of a scope, and its current stream.
class Launch {
 public:
  Launch(const char* operation, const Tensor& first, std::initializer_list<Tensor> others)
      : operation_(operation), guard_(first.device()) {
    for (const Tensor& other : others) {
      TORCH_CHECK_VALUE(other.device() == first.device(), operation, ": tensors on ", first.device(), " and ",
                        other.device());
    }
#if !defined(MEGAGAP_SHIM)
    TORCH_CHECK(aoti_torch_get_current_cuda_stream(first.get_device(), &stream_) == 0, operation,
                ": torch has no stream for ", first.device());
#endif
  }

  void* stream() const { return stream_; }

  void check(int error) const {
    TORCH_CHECK_NOT_IMPLEMENTED(error != kMegagapUnsupported, operation_, ": ", megagap_gpu_error(error));
    TORCH_CHECK(error == 0, operation_, ": the kernel did not start: ", megagap_gpu_error(error));
  }

 private:
  const char* operation_;
  c10::DeviceGuard guard_;
  void* stream_ = nullptr;
};

int type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return kMegagapFloat;
    case at::kBFloat16:
      return kMegagapBFloat16;
    case at::kHalf:
      return kMegagapHalf;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "megagap kernels compute in float32, bfloat16 or float16, not ",
                                  x.scalar_type());
  }
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

void check_like(const char* operation, const Tensor& x, const Tensor& other, const char* name) {
  TORCH_CHECK_VALUE(x.sizes() == other.sizes(), operation, ": ", name, " ", other.sizes(), " does not fit ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == other.scalar_type(), operation, ": ", name, " is ", other.scalar_type(), ", not ",
                   x.scalar_type());
}

void check_floats(const char* operation, const Tensor& x, int64_t count, const char* name) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, operation, ": ", name, " must be float32, not ", x.scalar_type());
  TORCH_CHECK_VALUE(x.numel() == count, operation, ": ", name, " ", x.sizes(), " must have ", count, " elements");
}

void check_targets(const char* operation, const Tensor& logits, const Tensor& targets) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && targets.dim() == 1 && targets.size(0) == logits.size(0), operation,
                    ": logits ", logits.sizes(), " and targets ", targets.sizes(), " do not fit");
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong, operation, ": targets must be int64, not ",
                   targets.scalar_type());
}

// --- RMSNorm ---

int64_t rows_of(const Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }

void check_rms_norm(const char* operation, const Tensor& x, const Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0), operation, ": x ", x.sizes(),
                    " and weight ", weight.sizes(), " do not fit");
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), operation, ": x is ", x.scalar_type(), ", weight is ",
                   weight.scalar_type());
}

Tensor empty_rows(const Tensor& x) {
  return at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_given, const Tensor& weight_given, double eps, double gain_scale) {
  check_rms_norm("rms_norm", x_given, weight_given);
  const Launch launch("rms_norm", x_given, {weight_given});
  const Tensor x = x_given.contiguous(), weight = weight_given.contiguous();
  Tensor y = at::empty(x.sizes(), x.options()), rstd = empty_rows(x);
  launch.check(megagap_gpu_rms_norm(type_of(x), x.data_ptr(), nullptr, weight.data_ptr(), y.data_ptr(), nullptr,
                                    data<float>(rstd), rows_of(x), x.size(-1), static_cast<float>(eps),
                                    static_cast<float>(gain_scale), launch.stream()));
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x_given, const Tensor& residual_given,
                                                const Tensor& weight_given, double eps, double gain_scale) {
  check_rms_norm("add_rms_norm", x_given, weight_given);
  check_like("add_rms_norm", x_given, residual_given, "the residual");
  const Launch launch("add_rms_norm", x_given, {residual_given, weight_given});
  const Tensor x = x_given.contiguous(), residual = residual_given.contiguous(), weight = weight_given.contiguous();
  Tensor y = at::empty(x.sizes(), x.options()), total = at::empty(x.sizes(), x.options()), rstd = empty_rows(x);
  launch.check(megagap_gpu_rms_norm(type_of(x), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.data_ptr(),
                                    total.data_ptr(), data<float>(rstd), rows_of(x), x.size(-1),
                                    static_cast<float>(eps), static_cast<float>(gain_scale), launch.stream()));
  return {y, total, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_gradients(const char* operation, const Tensor& grad_given,
                                              const std::optional<Tensor>& grad_total_given, const Tensor& x_given,
                                              const Tensor& weight_given, const Tensor& rstd_given,
                                              double gain_scale) {
  check_rms_norm(operation, x_given, weight_given);
  check_like(operation, x_given, grad_given, "the gradient");
  if (grad_total_given) check_like(operation, x_given, *grad_total_given, "the gradient of the total");
  const int64_t size = x_given.size(-1), rows = rows_of(x_given);
  check_floats(operation, rstd_given, size ? rows : rstd_given.numel(), "rstd");
  const Launch launch(operation, x_given,
                      {grad_given, grad_total_given.value_or(grad_given), weight_given, rstd_given});
  const Tensor grad = grad_given.contiguous(), x = x_given.contiguous(), weight = weight_given.contiguous(),
               rstd = rstd_given.contiguous();
  const Tensor grad_total = grad_total_given ? grad_total_given->contiguous() : Tensor();
  Tensor grad_x = at::empty(x.sizes(), x.options()), grad_weight = at::empty_like(weight);
  const int64_t parts = megagap_gpu_rms_norm_parts(type_of(x), rows, size);
  const Tensor partial = at::empty({parts, size}, x.options().dtype(at::kFloat));
  launch.check(megagap_gpu_rms_norm_backward(
      type_of(x), grad.data_ptr(), grad_total.defined() ? grad_total.data_ptr() : nullptr, x.data_ptr(),
      weight.data_ptr(), data<float>(rstd), grad_x.data_ptr(), grad_weight.data_ptr(), data<float>(partial), parts,
      rows, size, static_cast<float>(gain_scale), launch.stream()));
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, double gain_scale) {
  return rms_norm_gradients("rms_norm_backward", grad, std::nullopt, x, weight, rstd, gain_scale);
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& grad, const Tensor& grad_total, const Tensor& total,
                                                 const Tensor& weight, const Tensor& rstd, double gain_scale) {
  return rms_norm_gradients("add_rms_norm_backward", grad, grad_total, total, weight, rstd, gain_scale);
}

// --- Rotary ---

struct Tables {
  Tensor cos, sin, positions;
  int64_t rows;

  const int64_t* position_data() const { return positions.defined() ? data<const int64_t>(positions) : nullptr; }
};

// Of x [b, s, heads, d]: tables [s, d], [b, s, d] or, with positions [b, s], [p, d].
Tables tables_for(const char* operation, const Tensor& x, const Tensor& cos, const Tensor& sin,
                  const std::optional<Tensor>& positions) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(3) % 2 == 0, operation, ": ", x.sizes(),
                    " is not [batch, length, heads, an even head size]");
  const int64_t batch = x.size(0), length = x.size(1), size = x.size(3);
  const bool fits = positions ? cos.dim() == 2 && cos.size(1) == size
                              : cos.sizes() == at::IntArrayRef({length, size}) ||
                                    cos.sizes() == at::IntArrayRef({batch, length, size});
  TORCH_CHECK_VALUE(fits && cos.sizes() == sin.sizes(), operation, ": ", x.sizes(), " and tables ", cos.sizes(), ", ",
                    sin.sizes(), " do not fit");
  TORCH_CHECK_TYPE(cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat, operation,
                   ": the tables must be float32");
  Tables tables = {cos.contiguous(), sin.contiguous(), Tensor(), size ? cos.numel() / size : 0};
  if (positions) {
    TORCH_CHECK_VALUE(positions->sizes() == at::IntArrayRef({batch, length}), operation, ": positions ",
                      positions->sizes(), " do not fit ", x.sizes());
    TORCH_CHECK_TYPE(positions->scalar_type() == at::kLong, operation, ": positions must be int64");
    tables.positions = positions->contiguous();
  }
  return tables;
}

MegagapRotated rotated(const Tensor& in, const Tensor& out, int64_t heads) {
  return {in.data_ptr(),  out.data_ptr(),  heads,         in.stride(0), in.stride(1),
          in.stride(2), out.stride(0), out.stride(1), out.stride(2)};
}

Tensor with_unit_stride(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

std::tuple<Tensor, Tensor> rotary(const Tensor& q_given, const Tensor& k_given, const Tensor& cos, const Tensor& sin,
                                  const std::optional<Tensor>& positions, bool interleaved, bool backward) {
  const Tables tables = tables_for("rotary", q_given, cos, sin, positions);
  TORCH_CHECK_VALUE(k_given.dim() == 4 && k_given.size(0) == q_given.size(0) && k_given.size(1) == q_given.size(1) &&
                        k_given.size(3) == q_given.size(3),
                    "rotary: q ", q_given.sizes(), " and k ", k_given.sizes(), " do not fit");
  TORCH_CHECK_TYPE(q_given.scalar_type() == k_given.scalar_type(), "rotary: q is ", q_given.scalar_type(), ", k is ",
                   k_given.scalar_type());
  const Launch launch("rotary", q_given, {k_given, cos, sin, positions.value_or(cos)});
  const Tensor q = with_unit_stride(q_given), k = with_unit_stride(k_given);
  Tensor to_q = at::empty(q.sizes(), q.options()), to_k = at::empty(k.sizes(), k.options());
  const MegagapRotated q_view = rotated(q, to_q, q.size(2)), k_view = rotated(k, to_k, k.size(2));
  launch.check(megagap_gpu_rotary(type_of(q), &q_view, &k_view, data<float>(tables.cos), data<float>(tables.sin),
                                  tables.position_data(), tables.rows, q.size(0), q.size(1), q.size(3), interleaved,
                                  backward, launch.stream()));
  return {to_q, to_k};
}

void rotary_(const Tensor& packed, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
             int64_t heads, bool interleaved, bool backward) {
  const Tables tables = tables_for("rotary_", packed, cos, sin, positions);
  TORCH_CHECK_VALUE(heads >= 0 && heads <= packed.size(2), "rotary_: ", heads, " heads of ", packed.sizes());
  TORCH_CHECK_VALUE(packed.stride(3) == 1, "rotary_: the elements of a head must be contiguous");
  at::assert_no_internal_overlap(packed);
  const Launch launch("rotary_", packed, {cos, sin, positions.value_or(cos)});
  const MegagapRotated view = rotated(packed, packed, heads), none = {};
  launch.check(megagap_gpu_rotary(type_of(packed), &view, &none, data<float>(tables.cos), data<float>(tables.sin),
                                  tables.position_data(), tables.rows, packed.size(0), packed.size(1), packed.size(3),
                                  interleaved, backward, launch.stream()));
}

Tensor rotary_pack(const Tensor& q_given, const Tensor& k_given, const Tensor& v, const Tensor& cos, const Tensor& sin,
                   const std::optional<Tensor>& positions, bool interleaved, bool backward) {
  const Tables tables = tables_for("rotary_pack", q_given, cos, sin, positions);
  for (const Tensor& x : {k_given, v}) {
    TORCH_CHECK_VALUE(x.dim() == 4 && x.size(0) == q_given.size(0) && x.size(1) == q_given.size(1) &&
                          x.size(3) == q_given.size(3),
                      "rotary_pack: q ", q_given.sizes(), " and k or v ", x.sizes(), " do not fit");
    TORCH_CHECK_TYPE(x.scalar_type() == q_given.scalar_type(), "rotary_pack: q is ", q_given.scalar_type(),
                     ", k or v is ", x.scalar_type());
  }
  const Launch launch("rotary_pack", q_given, {k_given, v, cos, sin, positions.value_or(cos)});
  const Tensor q = with_unit_stride(q_given), k = with_unit_stride(k_given);
  const int64_t rotated_heads = q.size(2) + k.size(2);
  const Tensor packed = at::empty({q.size(0), q.size(1), rotated_heads + v.size(2), q.size(3)}, q.options());
  const MegagapRotated q_view = rotated(q, packed.narrow(2, 0, q.size(2)), q.size(2)),
                       k_view = rotated(k, packed.narrow(2, q.size(2), k.size(2)), k.size(2));
  launch.check(megagap_gpu_rotary(type_of(q), &q_view, &k_view, data<float>(tables.cos), data<float>(tables.sin),
                                  tables.position_data(), tables.rows, q.size(0), q.size(1), q.size(3), interleaved,
                                  backward, launch.stream()));
  packed.narrow(2, rotated_heads, v.size(2)).copy_(v);
  return packed;
}

// --- SwiGLU ---

// A tensor as rows [rows, size] that begin `stride` elements apart; one row where it is contiguous.
struct Rows {
  Tensor tensor;
  int64_t rows, size, stride;
};

Rows as_rows(const Tensor& x, bool as_one) {
  if (as_one) return {x.contiguous(), 1, x.numel(), 0};
  int64_t stride = 0, span = 0;  // of rows; from the start of one run of rows to the next
  bool even = x.dim() > 0 && (x.stride(-1) == 1 || x.size(-1) <= 1);
  for (int64_t i = x.dim() - 2; even && i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (span == 0) {
      stride = span = x.stride(i);
    }
    even = x.stride(i) == span && stride > 0;
    span *= x.size(i);
  }
  const Tensor rows = even ? x : x.contiguous();
  return {rows, rows_of(rows), rows.size(-1), even ? stride : rows.size(-1)};
}

Tensor swiglu(const Tensor& gate_given, const Tensor& up_given) {
  check_like("swiglu", gate_given, up_given, "up");
  const Launch launch("swiglu", gate_given, {up_given});
  const bool flat = gate_given.dim() == 0 || (gate_given.is_contiguous() && up_given.is_contiguous());
  const Rows gate = as_rows(gate_given, flat), up = as_rows(up_given, flat);
  Tensor y = at::empty(gate_given.sizes(), gate_given.options());
  launch.check(megagap_gpu_swiglu(type_of(y), gate.tensor.data_ptr(), up.tensor.data_ptr(), y.data_ptr(), gate.rows,
                                  gate.size, gate.stride, up.stride, launch.stream()));
  return y;
}

Tensor swiglu_backward(const Tensor& grad_given, const Tensor& gate_given, const Tensor& up_given) {
  check_like("swiglu_backward", gate_given, up_given, "up");
  check_like("swiglu_backward", gate_given, grad_given, "the gradient");
  const Launch launch("swiglu_backward", gate_given, {grad_given, up_given});
  TORCH_CHECK_VALUE(gate_given.dim() > 0, "swiglu_backward: the inputs have no dimension to pack their gradients in");
  const Rows grad = as_rows(grad_given, false), gate = as_rows(gate_given, false), up = as_rows(up_given, false);
  std::vector<int64_t> shape = gate_given.sizes().vec();
  shape.back() *= 2;
  const Tensor grads = at::empty(shape, gate_given.options()), to_gate = grads.narrow(-1, 0, gate.size),
               to_up = grads.narrow(-1, gate.size, gate.size);
  launch.check(megagap_gpu_swiglu_backward(type_of(grads), grad.tensor.data_ptr(), gate.tensor.data_ptr(),
                                           up.tensor.data_ptr(), to_gate.data_ptr(), to_up.data_ptr(), gate.rows,
                                           gate.size, grad.stride, gate.stride, up.stride, 2 * gate.size,
                                           launch.stream()));
  return grads;
}

// --- Cross-entropy ---

Tensor empty_statistics(const Tensor& logits) {
  return at::empty({3, logits.size(0)}, logits.options().dtype(at::kFloat));
}

// To be overwritten row by row.
void check_rows(const char* operation, const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.stride(1) == 1 || logits.size(1) <= 1, operation,
                    ": the logits of a row must be contiguous");
  at::assert_no_internal_overlap(logits);
}

Tensor cross_entropy_rows(const Tensor& logits_given, const Tensor& targets_given, int64_t first) {
  check_targets("cross_entropy_rows", logits_given, targets_given);
  const Launch launch("cross_entropy_rows", logits_given, {targets_given});
  const Tensor logits = with_unit_stride(logits_given), targets = targets_given.contiguous();
  Tensor statistics = empty_statistics(logits);
  launch.check(megagap_gpu_cross_entropy_rows(type_of(logits), logits.data_ptr(), data<int64_t>(targets), first,
                                              data<float>(statistics), logits.size(0), logits.size(1),
                                              logits.stride(0), launch.stream()));
  return statistics;
}

void cross_entropy_rows_gradient_(const Tensor& logits, const Tensor& targets_given, int64_t first,
                                  const Tensor& statistics_given, const Tensor& scale, double z_loss) {
  const char* operation = "cross_entropy_rows_gradient_";
  check_targets(operation, logits, targets_given);
  check_floats(operation, statistics_given, 3 * logits.size(0), "statistics");
  check_floats(operation, scale, 1, "scale");
  check_rows(operation, logits);
  const Launch launch(operation, logits, {targets_given, statistics_given, scale});
  const Tensor targets = targets_given.contiguous(), statistics = statistics_given.contiguous();
  launch.check(megagap_gpu_cross_entropy_rows_gradient(
      type_of(logits), logits.data_ptr(), data<int64_t>(targets), first, data<float>(statistics), data<float>(scale),
      static_cast<float>(z_loss), logits.size(0), logits.size(1), logits.stride(0), launch.stream()));
}

Tensor cross_entropy_(const Tensor& logits, const Tensor& targets_given, const Tensor& scale, double z_loss) {
  check_targets("cross_entropy_", logits, targets_given);
  check_floats("cross_entropy_", scale, 1, "scale");
  check_rows("cross_entropy_", logits);
  const Launch launch("cross_entropy_", logits, {targets_given, scale});
  const Tensor targets = targets_given.contiguous();
  Tensor statistics = empty_statistics(logits);
  launch.check(megagap_gpu_cross_entropy(type_of(logits), logits.data_ptr(), data<int64_t>(targets),
                                         data<float>(scale), static_cast<float>(z_loss), data<float>(statistics),
                                         logits.size(0), logits.size(1), logits.stride(0), launch.stream()));
  return statistics;
}

// --- AdamW ---

void adamw_(const Tensor& parameter, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grad,
            const Tensor& grad_scale, const Tensor& found_inf, const Tensor& step, double lr, double beta1,
            double beta2, double eps, double weight_decay, at::OptionalIntArrayRef rounding,
            const std::optional<Tensor>& remainder) {
  for (const Tensor& tensor : {parameter, exp_avg, exp_avg_sq, grad, remainder.value_or(parameter)}) {
    TORCH_CHECK_VALUE(tensor.sizes() == parameter.sizes() && tensor.is_contiguous(),
                      "adamw_: parameter, moments and gradient must be contiguous and of one shape, not ",
                      parameter.sizes(), " and ", tensor.sizes());
  }
  TORCH_CHECK_TYPE(exp_avg.scalar_type() == exp_avg_sq.scalar_type() &&
                       (exp_avg.scalar_type() == at::kFloat || exp_avg.scalar_type() == at::kBFloat16),
                   "adamw_: the moments must both be float32, or bfloat16");
  TORCH_CHECK_TYPE(!remainder || (parameter.scalar_type() == at::kBFloat16 && remainder->scalar_type() == at::kShort),
                   "adamw_: a remainder is in int16, of a parameter in bfloat16");
  const bool rounded =
      exp_avg.scalar_type() == at::kBFloat16 || (parameter.scalar_type() == at::kBFloat16 && !remainder);
  TORCH_CHECK_VALUE(!rounding || (rounding->size() == 5 && rounded),
                    "adamw_: the place of an element has five numbers, to round bfloat16 without a remainder");
  check_floats("adamw_", grad_scale, 1, "grad_scale");
  check_floats("adamw_", found_inf, 1, "found_inf");
  check_floats("adamw_", step, 1, "step");
  const Launch launch("adamw_", parameter,
                      {exp_avg, exp_avg_sq, grad, grad_scale, found_inf, step, remainder.value_or(parameter)});
  launch.check(megagap_gpu_adamw(type_of(parameter), type_of(exp_avg), type_of(grad), parameter.data_ptr(),
                                 exp_avg.data_ptr(), exp_avg_sq.data_ptr(), grad.data_ptr(), data<float>(grad_scale),
                                 data<float>(found_inf), data<float>(step), parameter.numel(), lr, beta1, beta2, eps,
                                 weight_decay, rounding ? rounding->data() : nullptr,
                                 remainder ? remainder->data_ptr() : nullptr, launch.stream()));
}

void register_all(torch::Library& m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("rms_norm_backward", &rms_norm_backward);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("add_rms_norm_backward", &add_rms_norm_backward);
  m.impl("rotary", &rotary);
  m.impl("rotary_", &rotary_);
  m.impl("rotary_pack", &rotary_pack);
  m.impl("swiglu", &swiglu);
  m.impl("swiglu_backward", &swiglu_backward);
  m.impl("cross_entropy_rows", &cross_entropy_rows);
  m.impl("cross_entropy_rows_gradient_", &cross_entropy_rows_gradient_);
  m.impl("cross_entropy_", &cross_entropy_);
  m.impl("adamw_", &adamw_);
}

}  // namespace
}  // namespace megagap::gpu

#if defined(MEGAGAP_SHIM)
TORCH_LIBRARY_IMPL(megagap_shim, CPU, m) { megagap::gpu::register_all(m); }
#else
TORCH_LIBRARY_IMPL(megagap, CUDA, m) { megagap::gpu::register_all(m); }
#endif
