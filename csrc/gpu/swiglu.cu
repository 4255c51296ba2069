// SwiGLU's elementwise part (Shazeer 2020): silu(gate) * up, rounded once.
#include "gpu/dispatch.h"
#include "gpu/elements.h"
#include "gpu/kernels.h"

namespace megagap::gpu {
namespace {

constexpr int kSwigluBlock = 256;
constexpr int kSwigluChunks = 2;  // that a thread has in flight of each tensor

// 1 / (1 + exp(-x)); 16-bit types do not see the error of the fast functions.
template <typename T>
MEGAGAP_DEVICE float sigmoid(float x) {
  if constexpr (sizeof(T) == 2) {
    return fast_divide(1.0f, 1.0f + fast_exp(-x));
  } else {
    return 1.0f / (1.0f + expf(-x));
  }
}

template <typename T>
MEGAGAP_DEVICE float swiglu_of(float gate, float up) {
  return gate * sigmoid<T>(gate) * up;
}

template <typename T>
MEGAGAP_DEVICE void swiglu_gradients(float grad, float gate, float up, float& grad_gate, float& grad_up) {
  const float share = sigmoid<T>(gate), silu = gate * share;
  grad_gate = grad * up * (share + silu * (1.0f - share));
  grad_up = grad * silu;
}

// The columns of a row that one block computes: [begin, end) in steps of whole chunks, then single elements.
struct Portion {
  int64_t row, begin, end;
};

template <int kWidth>
MEGAGAP_DEVICE Portion portion_of(int64_t block, int64_t splits, int64_t size) {
  constexpr int64_t kElements = int64_t{kSwigluBlock} * kSwigluChunks * kWidth;
  const int64_t row = block / splits, begin = (block - row * splits) * kElements;
  return {row, begin, begin + kElements < size ? begin + kElements : size};
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kSwigluBlock)
    swiglu_kernel(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ y, int64_t rows, int64_t splits,
                  int64_t size, int64_t gate_stride, int64_t up_stride) {
  constexpr int64_t kStep = int64_t{kSwigluBlock} * kWidth;
  for (int64_t block = blockIdx.x; block < rows * splits; block += gridDim.x) {
    const Portion portion = portion_of<kWidth>(block, splits, size);
    const T* gate_row = gate + portion.row * gate_stride;
    const T* up_row = up + portion.row * up_stride;
    T* y_row = y + portion.row * size;
    const int64_t begin = portion.begin + int64_t{threadIdx.x} * kWidth;
    Chunk<T, kWidth> gates[kSwigluChunks], ups[kSwigluChunks];
#pragma unroll
    for (int k = 0; k < kSwigluChunks; ++k) {
      const int64_t column = begin + k * kStep;
      if (column + kWidth > portion.end) continue;
      gates[k] = load<kWidth>(gate_row + column);
      ups[k] = load<kWidth>(up_row + column);
    }
#pragma unroll
    for (int k = 0; k < kSwigluChunks; ++k) {
      const int64_t column = begin + k * kStep;
      if (column + kWidth > portion.end) continue;
      Chunk<T, kWidth> result;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) result.set(i, swiglu_of<T>(gates[k].get(i), ups[k].get(i)));
      store(y_row + column, result);
    }
    // What is left of the row's end: fewer elements than a chunk.
    const int64_t column = portion.end - portion.end % kWidth + threadIdx.x;
    if (kWidth > 1 && portion.end == size && column < size) {
      y_row[column] = from_float<T>(swiglu_of<T>(to_float(gate_row[column]), to_float(up_row[column])));
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kSwigluBlock)
    swiglu_backward_kernel(const T* __restrict__ grad, const T* __restrict__ gate, const T* __restrict__ up,
                           T* __restrict__ grad_gate, T* __restrict__ grad_up, int64_t rows, int64_t splits,
                           int64_t size, int64_t grad_stride, int64_t gate_stride, int64_t up_stride,
                           int64_t to_stride) {
  constexpr int64_t kStep = int64_t{kSwigluBlock} * kWidth;
  for (int64_t block = blockIdx.x; block < rows * splits; block += gridDim.x) {
    const Portion portion = portion_of<kWidth>(block, splits, size);
    const T* grad_row = grad + portion.row * grad_stride;
    const T* gate_row = gate + portion.row * gate_stride;
    const T* up_row = up + portion.row * up_stride;
    T* grad_gate_row = grad_gate + portion.row * to_stride;
    T* grad_up_row = grad_up + portion.row * to_stride;
    const int64_t begin = portion.begin + int64_t{threadIdx.x} * kWidth;
    Chunk<T, kWidth> grads[kSwigluChunks], gates[kSwigluChunks], ups[kSwigluChunks];
#pragma unroll
    for (int k = 0; k < kSwigluChunks; ++k) {
      const int64_t column = begin + k * kStep;
      if (column + kWidth > portion.end) continue;
      grads[k] = load<kWidth>(grad_row + column);
      gates[k] = load<kWidth>(gate_row + column);
      ups[k] = load<kWidth>(up_row + column);
    }
#pragma unroll
    for (int k = 0; k < kSwigluChunks; ++k) {
      const int64_t column = begin + k * kStep;
      if (column + kWidth > portion.end) continue;
      Chunk<T, kWidth> to_gate, to_up;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        float by_gate, by_up;
        swiglu_gradients<T>(grads[k].get(i), gates[k].get(i), ups[k].get(i), by_gate, by_up);
        to_gate.set(i, by_gate);
        to_up.set(i, by_up);
      }
      store(grad_gate_row + column, to_gate);
      store(grad_up_row + column, to_up);
    }
    const int64_t column = portion.end - portion.end % kWidth + threadIdx.x;
    if (kWidth > 1 && portion.end == size && column < size) {
      float by_gate, by_up;
      swiglu_gradients<T>(to_float(grad_row[column]), to_float(gate_row[column]), to_float(up_row[column]), by_gate,
                          by_up);
      grad_gate_row[column] = from_float<T>(by_gate);
      grad_up_row[column] = from_float<T>(by_up);
    }
  }
}

int64_t splits_for(int64_t size, int width) {
  return ceil_divide(size, int64_t{kSwigluBlock} * kSwigluChunks * width);
}

template <typename T>
int swiglu(const T* gate, const T* up, T* y, int64_t rows, int64_t size, int64_t gate_stride, int64_t up_stride,
           void* stream) {
  const bool whole = aligned(gate, rows > 1 ? gate_stride : 0) && aligned(up, rows > 1 ? up_stride : 0) &&
                     aligned(y, rows > 1 ? size : 0);
  const int64_t splits = splits_for(size, whole ? kVector<T> : 1);
  return launch(whole ? swiglu_kernel<T, kVector<T>> : swiglu_kernel<T, 1>, rows * splits, dim3(kSwigluBlock), stream,
                gate, up, y, rows, splits, size, gate_stride, up_stride);
}

template <typename T>
int swiglu_backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t rows, int64_t size,
                    int64_t grad_stride, int64_t gate_stride, int64_t up_stride, int64_t to_stride, void* stream) {
  const bool whole = aligned(grad, rows > 1 ? grad_stride : 0) && aligned(gate, rows > 1 ? gate_stride : 0) &&
                     aligned(up, rows > 1 ? up_stride : 0) && aligned(grad_gate, rows > 1 ? to_stride : 0) &&
                     aligned(grad_up);
  const int64_t splits = splits_for(size, whole ? kVector<T> : 1);
  return launch(whole ? swiglu_backward_kernel<T, kVector<T>> : swiglu_backward_kernel<T, 1>, rows * splits,
                dim3(kSwigluBlock), stream, grad, gate, up, grad_gate, grad_up, rows, splits, size, grad_stride,
                gate_stride, up_stride, to_stride);
}

}  // namespace
}  // namespace megagap::gpu

extern "C" int megagap_gpu_swiglu(int type, const void* gate, const void* up, void* y, int64_t rows, int64_t size,
                                  int64_t gate_stride, int64_t up_stride, void* stream) {
  if (rows == 0 || size == 0) return 0;
  return megagap::gpu::for_type(type, [&](auto element) {
    using T = decltype(element);
    return megagap::gpu::swiglu(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(y), rows, size,
                           gate_stride, up_stride, stream);
  });
}

extern "C" int megagap_gpu_swiglu_backward(int type, const void* grad, const void* gate, const void* up,
                                           void* grad_gate, void* grad_up, int64_t rows, int64_t size,
                                           int64_t grad_stride, int64_t gate_stride, int64_t up_stride,
                                           int64_t to_stride, void* stream) {
  if (rows == 0 || size == 0) return 0;
  return megagap::gpu::for_type(type, [&](auto element) {
    using T = decltype(element);
    return megagap::gpu::swiglu_backward(static_cast<const T*>(grad), static_cast<const T*>(gate),
                                    static_cast<const T*>(up), static_cast<T*>(grad_gate), static_cast<T*>(grad_up),
                                    rows, size, grad_stride, gate_stride, up_stride, to_stride, stream);
  });
}
