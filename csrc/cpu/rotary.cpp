// Rotary position embeddings (Su et al. 2021), half-split: the pairs (x[i], x[i + d / 2]) of every head are rotated.
#include "cpu/kernels.h"

namespace megagap {
namespace {

// The gradient is rotated by the transposed matrices, which for equal halves of the tables is the opposite rotation.
template <typename T, bool kBackward>
MEGAGAP_INLINE void rotate(const T* x, const float* cos, const float* sin, T* y, int64_t heads, int64_t half) {
  for (int64_t head = 0; head < heads; ++head) {
    const T* first = x + head * 2 * half;
    const T* second = first + half;
    T* y_first = y + head * 2 * half;
    T* y_second = y_first + half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = to_float(first[i]), b = to_float(second[i]);
      if (kBackward) {
        y_first[i] = from_float<T>(a * cos[i] + b * sin[half + i]);
        y_second[i] = from_float<T>(b * cos[half + i] - a * sin[i]);
      } else {
        y_first[i] = from_float<T>(a * cos[i] - b * sin[i]);
        y_second[i] = from_float<T>(b * cos[half + i] + a * sin[half + i]);
      }
    }
  }
}

template <typename T>
MEGAGAP_INLINE void rows(const T* x, const float* cos, const float* sin, T* y, int64_t begin, int64_t end,
                         int64_t heads, int64_t half, int64_t positions, bool backward) {
  for (int64_t token = begin; token < end; ++token) {
    const T* from = x + token * heads * 2 * half;
    T* to = y + token * heads * 2 * half;
    const int64_t table = token % positions * 2 * half;
    if (backward) {
      rotate<T, true>(from, cos + table, sin + table, to, heads, half);
    } else {
      rotate<T, false>(from, cos + table, sin + table, to, heads, half);
    }
  }
}

}  // namespace

MEGAGAP_CLONES void rotary_rows(const float* x, const float* cos, const float* sin, float* y, int64_t begin,
                                int64_t end, int64_t heads, int64_t half, int64_t positions, bool backward) {
  rows(x, cos, sin, y, begin, end, heads, half, positions, backward);
}

MEGAGAP_CLONES void rotary_rows(const BFloat16* x, const float* cos, const float* sin, BFloat16* y, int64_t begin,
                                int64_t end, int64_t heads, int64_t half, int64_t positions, bool backward) {
  rows(x, cos, sin, y, begin, end, heads, half, positions, backward);
}

}  // namespace megagap
