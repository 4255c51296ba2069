// Cross-entropy over a vocabulary shard: what a row of logits contributes to the loss, and its gradient in place.
#include "gpu/dispatch.h"
#include "gpu/elements.h"
#include "gpu/kernels.h"
#include "gpu/reduce.h"

namespace megagap::gpu {
namespace {

constexpr int kRowBlock = 512;     // threads, at most, that share a row
constexpr int kLogitsHeld = 4;     // chunks that a thread has in flight
constexpr int kGradientBlock = 256;
constexpr int kGradientChunks = 4;

template <typename T>
MEGAGAP_DEVICE float exp_of(float x) {
  if constexpr (sizeof(T) == 2) {
    return fast_exp(x);  // its error is far below the rounding of the logits
  } else {
    return expf(x);
  }
}

MEGAGAP_DEVICE float infinity() { return __uint_as_float(0x7f800000u); }

// exp(x - maximum) for x <= maximum, also where both are minus infinity.
template <typename T>
MEGAGAP_DEVICE float exp_below(float x, float maximum) {
  return exp_of<T>(x - (maximum == -infinity() ? 0.0f : maximum));
}

// A maximum and the sum of exp(x - maximum), over values seen so far.
template <typename T>
struct Running {
  float maximum = -infinity(), sum = 0;

  template <int kCount>
  MEGAGAP_DEVICE void add(const float (&values)[kCount]) {
    float largest = maximum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) largest = Maximum::apply(largest, values[i]);
    sum *= exp_below<T>(maximum, largest);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += exp_below<T>(values[i], largest);
    maximum = largest;
  }
};

// One block per row. Every thread keeps a running maximum and sum, combined at the end.
template <typename T>
__global__ void __launch_bounds__(kRowBlock)
    cross_entropy_rows_kernel(const T* __restrict__ logits, const int64_t* __restrict__ targets,
                              float* __restrict__ maximum, float* __restrict__ sum, float* __restrict__ target_logit,
                              int64_t rows, int size, int64_t stride, bool whole) {
  __shared__ float shared[2][kMaxWaves];
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int vectors = whole ? size / kVector<T> : 0;  // the rest is read element by element
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x = logits + row * stride;
    Running<T> running;
    int first = thread;
    for (; first + (kLogitsHeld - 1) * threads < vectors; first += kLogitsHeld * threads) {
      Chunk<T, kVector<T>> held[kLogitsHeld];
#pragma unroll
      for (int k = 0; k < kLogitsHeld; ++k) held[k] = load<kVector<T>>(x + (first + k * threads) * kVector<T>);
      float values[kLogitsHeld * kVector<T>];
#pragma unroll
      for (int k = 0; k < kLogitsHeld; ++k) {
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) values[k * kVector<T> + i] = held[k].get(i);
      }
      running.add(values);
    }
    for (; first < vectors; first += threads) {
      const auto chunk = load<kVector<T>>(x + first * kVector<T>);
      float values[kVector<T>];
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) values[i] = chunk.get(i);
      running.add(values);
    }
    for (int i = vectors * kVector<T> + thread; i < size; i += threads) {
      const float value[1] = {to_float(x[i])};
      running.add(value);
    }
    const float largest = reduce_group<Maximum>(running.maximum, threads, shared[0]);
    const float total =
        reduce_group<Sum>(running.sum * exp_below<T>(running.maximum, largest), threads, shared[1]);
    if (thread == 0) {
      const int64_t target = targets[row];
      maximum[row] = largest;
      sum[row] = total;
      target_logit[row] = target >= 0 && target < size ? to_float(x[target]) : 0.0f;
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kGradientBlock)
    cross_entropy_rows_gradient_kernel(T* logits, const int64_t* __restrict__ targets, const float* __restrict__ lse,
                                       const float* __restrict__ scale, int64_t rows, int splits, int size,
                                       int64_t stride) {
  constexpr int kStep = kGradientBlock * kWidth;
  for (int64_t block = blockIdx.x; block < rows * splits; block += gridDim.x) {
    const int64_t row = block / splits, target = targets[row];
    T* x = logits + row * stride;
    const float row_lse = lse[row], row_scale = scale[row];
    const auto gradient = [&](float logit, int column) {
      return (exp_of<T>(logit - row_lse) - (column == target ? 1.0f : 0.0f)) * row_scale;
    };
    const int begin = static_cast<int>(block - row * splits) * kGradientChunks * kStep;
    const int mine = begin + static_cast<int>(threadIdx.x) * kWidth;
    Chunk<T, kWidth> held[kGradientChunks];
#pragma unroll
    for (int k = 0; k < kGradientChunks; ++k) {
      if (mine + k * kStep + kWidth <= size) held[k] = load<kWidth>(x + mine + k * kStep);
    }
#pragma unroll
    for (int k = 0; k < kGradientChunks; ++k) {
      const int column = mine + k * kStep;
      if (column + kWidth > size) continue;
      Chunk<T, kWidth> result;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) result.set(i, gradient(held[k].get(i), column + i));
      store(x + column, result);
    }
    // What is left of the row's end: fewer elements than a chunk.
    const int rest = size - size % kWidth + static_cast<int>(threadIdx.x);
    if (kWidth > 1 && begin + kGradientChunks * kStep >= size && rest < size) {
      x[rest] = from_float<T>(gradient(to_float(x[rest]), rest));
    }
  }
}

template <typename T>
int cross_entropy_rows(const T* logits, const int64_t* targets, float* maximum, float* sum, float* target_logit,
                       int64_t rows, int64_t size, int64_t stride, void* stream) {
  int block = 64;  // a whole wave on every device
  while (block < kRowBlock && int64_t{block} * kLogitsHeld * kVector<T> < size) block *= 2;
  return launch(cross_entropy_rows_kernel<T>, rows, dim3(block), stream, logits, targets, maximum, sum, target_logit,
                rows, size, stride, aligned(logits, rows > 1 ? stride : 0));
}

template <typename T>
int cross_entropy_rows_gradient(T* logits, const int64_t* targets, const float* lse, const float* scale, int64_t rows,
                                int64_t size, int64_t stride, void* stream) {
  const bool whole = aligned(logits, rows > 1 ? stride : 0);
  const int width = whole ? kVector<T> : 1;
  const int64_t splits = ceil_divide(size, int64_t{kGradientBlock} * kGradientChunks * width);
  return launch(whole ? cross_entropy_rows_gradient_kernel<T, kVector<T>> : cross_entropy_rows_gradient_kernel<T, 1>,
                rows * splits, dim3(kGradientBlock), stream, logits, targets, lse, scale, rows, splits, size, stride);
}

}  // namespace
}  // namespace megagap::gpu

extern "C" int megagap_gpu_cross_entropy_rows(int type, const void* logits, const int64_t* targets, float* maximum,
                                              float* sum, float* target_logit, int64_t rows, int64_t size,
                                              int64_t stride, void* stream) {
  if (size > megagap::gpu::kMaxRow) return kMegagapUnsupported;
  if (rows == 0) return 0;
  return megagap::gpu::for_type(type, [&](auto element) {
    return megagap::gpu::cross_entropy_rows(static_cast<const decltype(element)*>(logits), targets, maximum, sum,
                                       target_logit, rows, size, stride, stream);
  });
}

extern "C" int megagap_gpu_cross_entropy_rows_gradient(int type, void* logits, const int64_t* targets,
                                                       const float* lse, const float* scale, int64_t rows,
                                                       int64_t size, int64_t stride, void* stream) {
  if (size > megagap::gpu::kMaxRow) return kMegagapUnsupported;
  if (rows == 0 || size == 0) return 0;
  return megagap::gpu::for_type(type, [&](auto element) {
    return megagap::gpu::cross_entropy_rows_gradient(static_cast<decltype(element)*>(logits), targets, lse, scale, rows,
                                                size, stride, stream);
  });
}
