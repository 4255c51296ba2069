// The CPU kernels: loops over raw rows, compiled once for each instruction set (isa_*.cpp), one of which is chosen when
// the first is called. cpu/ops.cpp gives them tensors and threads. The formulas are in the headers named at each kernel.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#define MEGAGAP_INLINE inline __attribute__((always_inline))

namespace megagap {

// Half-precision types as their bits: arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

MEGAGAP_INLINE float to_float(float value) { return value; }

MEGAGAP_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

MEGAGAP_INLINE float to_float(Half value) { return c10::detail::fp16_ieee_to_fp32_value(value.bits); }

template <typename T>
MEGAGAP_INLINE T from_float(float value);

template <>
MEGAGAP_INLINE float from_float<float>(float value) {
  return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <>
MEGAGAP_INLINE BFloat16 from_float<BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(value == value ? rounded : 0x7fc0)};
}

template <>
MEGAGAP_INLINE Half from_float<Half>(float value) {
  return {c10::detail::fp16_ieee_from_fp32_value(value)};
}

// Which random bits round which element: those of a parameter's key and of the element's place in the global tensor.
// Element i of a buffer is element first + i, row by row, of a rectangle with rows of `columns` elements. They start
// `pitch` elements apart in the global tensor, the first at `offset`.
struct Rounding {
  int64_t key, first, columns, pitch, offset;
};

// The scalars of an AdamW update; adamw.h has the formula.
struct AdamW {
  float keep2, take1, take2;  // beta2, 1 - beta1, 1 - beta2
  float kept;                 // 1 - lr * weight_decay
  float step_size, root2;     // lr / (1 - beta1^step), sqrt(1 - beta2^step)
  float eps, grad_divisor;
  bool stochastic;
  Rounding rounding;
  uint32_t step;
};

// Where a rotary kernel finds its inputs, in elements. Tables are [rows, 2 * half] floats.
struct RotaryRows {
  int64_t heads, half;
  int64_t head_stride_in, head_stride_out;
  bool interleaved, backward, streaming;
};

// Elements [first, first + size) of flat buffers, which start at the pointers. remainder: null, or that of a parameter in
// bfloat16.
template <typename T, typename M, typename G>
using AdamWUpdate = void (*)(T* parameter, uint16_t* remainder, M* exp_avg, M* exp_avg_sq, const G* grad, int64_t first,
                             int64_t size, const AdamW& form);

// Every kernel for elements of type T. Rows are contiguous; strides are between rows, in elements. streaming: the results
// are too large to stay in the caches.
template <typename T>
struct Kernels {
  // rms_norm.h. residual and total: null, or the residual stream that is added first, and the sum.
  void (*rms_norm)(const T* x, int64_t x_stride, const T* residual, const T* weight, T* y, T* total, float* rstd,
                   int64_t rows, int64_t size, float eps, float gain_scale, bool streaming);
  // grad_total: null, or the gradient of the sum. Adds the rows' gradient of the gain to grad_weight [size].
  void (*rms_norm_backward)(const T* grad, const T* grad_total, const T* x, int64_t x_stride, const T* weight,
                            const float* rstd, T* grad_x, float* grad_weight, int64_t rows, int64_t size,
                            float gain_scale, bool streaming);
  // rotary.h. All heads of one token, whose row of the tables is given; in place where x is y.
  void (*rotary)(const T* x, T* y, const float* cos, const float* sin, const RotaryRows& form);
  // swiglu.h.
  void (*swiglu)(const T* gate, const T* up, T* y, int64_t size, bool streaming);
  void (*swiglu_backward)(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t size,
                          bool streaming);
  // cross_entropy.h, one row of logits. target: its column, or -1. factor: of the softmax in the gradient.
  void (*cross_entropy)(const T* logits, int64_t target, int64_t size, float* maximum, float* sum, float* at_target);
  void (*cross_entropy_gradient)(T* logits, int64_t target, int64_t size, float log_sum_exp, float factor,
                                 float scale);
  // adamw.h, by the types of moments and gradient.
  AdamWUpdate<T, float, float> adamw;
  AdamWUpdate<T, float, BFloat16> adamw_of_bfloat16;
  AdamWUpdate<T, BFloat16, float> adamw_in_bfloat16;
  AdamWUpdate<T, BFloat16, BFloat16> adamw_in_and_of_bfloat16;
};

// Those for the instruction set that torch has chosen (ATEN_CPU_CAPABILITY overrides it, as for torch's own).
template <typename T>
const Kernels<T>& kernels();

namespace isa_default {
template <typename T>
const Kernels<T>& kernels();
}
namespace isa_avx2 {
template <typename T>
const Kernels<T>& kernels();
}
namespace isa_avx512 {
template <typename T>
const Kernels<T>& kernels();
}

}  // namespace megagap
