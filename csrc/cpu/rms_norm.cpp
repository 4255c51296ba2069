// RMSNorm (Zhang & Sennrich 2019) with the roundings of transformers' LlamaRMSNorm: the normalised value is rounded
// to x's type before it is multiplied by the weight.
#include "cpu/kernels.h"

#include <cmath>

namespace megagap {
namespace {

template <typename T>
MEGAGAP_INLINE void forward(const T* x, const T* weight, T* y, float* rstd, int64_t begin, int64_t end, int64_t size,
                            float eps) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x_row = x + row * size;
    T* y_row = y + row * size;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; ++i) {
      const float value = to_float(x_row[i]);
      squares += value * value;
    }
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
    rstd[row] = scale;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const T normalised = from_float<T>(to_float(x_row[i]) * scale);
      y_row[i] = from_float<T>(to_float(weight[i]) * to_float(normalised));
    }
  }
}

// With n = x * rstd and g = grad * weight: grad_x = rstd * (g - n * mean(g * n)), grad_weight = sum over rows grad * n.
template <typename T>
MEGAGAP_INLINE void backward(const T* grad, const T* x, const T* weight, const float* rstd, T* grad_x,
                             float* grad_weight, int64_t begin, int64_t end, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    grad_weight[i] = 0;
  }
  for (int64_t row = begin; row < end; ++row) {
    const T* grad_row = grad + row * size;
    const T* x_row = x + row * size;
    T* grad_x_row = grad_x + row * size;
    const float scale = rstd[row];
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < size; ++i) {
      const float normalised = to_float(x_row[i]) * scale;
      const float from_above = to_float(grad_row[i]);
      dot += from_above * to_float(weight[i]) * normalised;
      grad_weight[i] += from_above * to_float(from_float<T>(normalised));
    }
    const float mean = dot / static_cast<float>(size);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float normalised = to_float(x_row[i]) * scale;
      grad_x_row[i] = from_float<T>(scale * (to_float(grad_row[i]) * to_float(weight[i]) - normalised * mean));
    }
  }
}

}  // namespace

MEGAGAP_CLONES void rms_norm_rows(const float* x, const float* weight, float* y, float* rstd, int64_t begin,
                                  int64_t end, int64_t size, float eps) {
  forward(x, weight, y, rstd, begin, end, size, eps);
}

MEGAGAP_CLONES void rms_norm_rows(const BFloat16* x, const BFloat16* weight, BFloat16* y, float* rstd, int64_t begin,
                                  int64_t end, int64_t size, float eps) {
  forward(x, weight, y, rstd, begin, end, size, eps);
}

MEGAGAP_CLONES void rms_norm_rows_backward(const float* grad, const float* x, const float* weight, const float* rstd,
                                           float* grad_x, float* grad_weight, int64_t begin, int64_t end,
                                           int64_t size) {
  backward(grad, x, weight, rstd, grad_x, grad_weight, begin, end, size);
}

MEGAGAP_CLONES void rms_norm_rows_backward(const BFloat16* grad, const BFloat16* x, const BFloat16* weight,
                                           const float* rstd, BFloat16* grad_x, float* grad_weight, int64_t begin,
                                           int64_t end, int64_t size) {
  backward(grad, x, weight, rstd, grad_x, grad_weight, begin, end, size);
}

}  // namespace megagap
