// The operations on CPU tensors. The schemas in bindings.cpp and the plain forms in megagap/ops/ define them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace megagap::cpu {

using at::Tensor;

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double gain_scale);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, double gain_scale);
std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps, double gain_scale);
std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& grad, const Tensor& grad_total, const Tensor& total,
                                                 const Tensor& weight, const Tensor& rstd, double gain_scale);
std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  const std::optional<Tensor>& positions, bool interleaved, bool backward);
void rotary_(const Tensor& packed, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
             int64_t heads, bool interleaved, bool backward);
Tensor rotary_pack(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                   const std::optional<Tensor>& positions, bool interleaved, bool backward);
Tensor swiglu(const Tensor& gate, const Tensor& up);
Tensor swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up);
Tensor cross_entropy_rows(const Tensor& logits, const Tensor& targets, int64_t first);
void cross_entropy_rows_gradient_(const Tensor& logits, const Tensor& targets, int64_t first, const Tensor& statistics,
                                  const Tensor& scale, double z_loss);
Tensor cross_entropy_(const Tensor& logits, const Tensor& targets, const Tensor& scale, double z_loss);
void adamw_(const Tensor& parameter, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grad,
            const Tensor& grad_scale, const Tensor& found_inf, const Tensor& step, double lr, double beta1,
            double beta2, double eps, double weight_decay, at::OptionalIntArrayRef rounding,
            const std::optional<Tensor>& remainder);

}  // namespace megagap::cpu
