// Cross-entropy over a vocabulary shard: what a row of logits contributes to the loss, and its gradient in place.
#include "gpu/dispatch.h"
#include "gpu/elements.h"
#include "gpu/kernels.h"
#include "gpu/reduce.h"

namespace megagap::gpu {
namespace {

constexpr int kRowBlock = 512;       // threads, at most, that share a row
constexpr int kOnePassBlock = 1024;  // the same where the row is read twice: threads of a multiprocessor
constexpr int kLogitsHeld = 4;       // chunks that a thread has in flight
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

// The column of a target among those from `first` on, or -1.
MEGAGAP_DEVICE int column_of(int64_t target, int64_t first, int size) {
  return target >= first && target < first + size ? static_cast<int>(target - first) : -1;
}

template <typename T>
MEGAGAP_DEVICE float logit_at(const T* x, int column) {
  return column < 0 ? 0.0f : to_float(x[column]);
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

// Of a row, by all threads of the block: each keeps a running maximum and sum, and gets those of the row.
template <typename T>
MEGAGAP_DEVICE Running<T> over_row(const T* x, int vectors, int size, float (&shared)[2][kMaxWaves]) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
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
  running.sum = reduce_group<Sum>(running.sum * exp_below<T>(running.maximum, largest), threads, shared[1]);
  running.maximum = largest;
  return running;
}

// (softmax * (1 + 2 z log_sum_exp) - [column == target]) * scale: the gradient of a row's cross-entropy and of
// z log_sum_exp^2, times scale; 0 where the target is ignored.
template <typename T>
struct Gradient {
  float log_sum_exp, factor, scale;
  int column;

  MEGAGAP_DEVICE Gradient(float maximum, float sum, int64_t target, int column, float scale, float z_loss)
      : log_sum_exp(maximum + logf(sum)),
        factor(1.0f + 2.0f * z_loss * log_sum_exp),
        scale(target < 0 ? 0.0f : scale),
        column(column) {}

  MEGAGAP_DEVICE float operator()(float logit, int at) const {
    return (exp_of<T>(logit - log_sum_exp) * factor - (at == column ? 1.0f : 0.0f)) * scale;
  }
};

// Replaces a row by its gradient, from the end, which was read last and is the likeliest to be cached.
template <typename T>
MEGAGAP_DEVICE void replace_row(T* x, int vectors, int size, const Gradient<T>& gradient) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  for (int i = size - 1 - thread; i >= vectors * kVector<T>; i -= threads) {
    x[i] = from_float<T>(gradient(to_float(x[i]), i));
  }
  for (int last = vectors - 1 - thread; last >= 0; last -= kLogitsHeld * threads) {
    Chunk<T, kVector<T>> held[kLogitsHeld];
#pragma unroll
    for (int k = 0; k < kLogitsHeld; ++k) {
      if (last >= k * threads) held[k] = load<kVector<T>>(x + (last - k * threads) * kVector<T>);
    }
#pragma unroll
    for (int k = 0; k < kLogitsHeld; ++k) {
      if (last < k * threads) continue;
      const int column = (last - k * threads) * kVector<T>;
      Chunk<T, kVector<T>> result;
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) result.set(i, gradient(held[k].get(i), column + i));
      store(x + column, result);
    }
  }
}

// One block per row.
template <typename T>
__global__ void __launch_bounds__(kRowBlock)
    cross_entropy_rows_kernel(const T* __restrict__ logits, const int64_t* __restrict__ targets, int64_t first,
                              float* __restrict__ statistics, int64_t rows, int size, int64_t stride, bool whole) {
  __shared__ float shared[2][kMaxWaves];
  const int vectors = whole ? size / kVector<T> : 0;  // the rest is read element by element
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x = logits + row * stride;
    const Running<T> all = over_row(x, vectors, size, shared);
    if (threadIdx.x == 0) {
      statistics[row] = all.maximum;
      statistics[rows + row] = all.sum;
      statistics[2 * rows + row] = logit_at(x, column_of(targets[row], first, size));
    }
  }
}

// Both passes over a row by one block, of which there are so few that the rows between their passes stay in the L2
// cache: 132 of 128,256 logits in bfloat16 are 34 MB, of an H100's 50.
template <typename T>
__global__ void __launch_bounds__(kOnePassBlock)
    cross_entropy_kernel(T* logits, const int64_t* __restrict__ targets, const float* __restrict__ scale, float z_loss,
                         float* __restrict__ statistics, int64_t rows, int size, int64_t stride, bool whole) {
  __shared__ float shared[2][kMaxWaves];
  const int vectors = whole ? size / kVector<T> : 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    T* x = logits + row * stride;
    // Before a thread overwrites it: none does before all have come to the sum over the row.
    if (threadIdx.x == 0) statistics[2 * rows + row] = logit_at(x, column_of(targets[row], 0, size));
    const Running<T> all = over_row<T>(x, vectors, size, shared);
    if (threadIdx.x == 0) {
      statistics[row] = all.maximum;
      statistics[rows + row] = all.sum;
    }
    const int64_t target = targets[row];
    const int column = column_of(target, 0, size);
    replace_row(x, vectors, size, Gradient<T>(all.maximum, all.sum, target, column, *scale, z_loss));
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kGradientBlock)
    cross_entropy_rows_gradient_kernel(T* logits, const int64_t* __restrict__ targets, int64_t first,
                                       const float* __restrict__ statistics, const float* __restrict__ scale,
                                       float z_loss, int64_t rows, int splits, int size, int64_t stride) {
  constexpr int kStep = kGradientBlock * kWidth;
  for (int64_t block = blockIdx.x; block < rows * splits; block += gridDim.x) {
    const int64_t row = block / splits, target = targets[row];
    T* x = logits + row * stride;
    const Gradient<T> gradient(statistics[row], statistics[rows + row], target, column_of(target, first, size), *scale,
                               z_loss);
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

// As many threads as have work in a row; whole waves on every device.
template <typename T>
int threads_for(int64_t size, int most) {
  int threads = 64;
  while (threads < most && int64_t{threads} * kLogitsHeld * kVector<T> < size) threads *= 2;
  return threads;
}

template <typename T>
int cross_entropy_rows(const T* logits, const int64_t* targets, int64_t first, float* statistics, int64_t rows,
                       int64_t size, int64_t stride, void* stream) {
  return launch(cross_entropy_rows_kernel<T>, rows, dim3(threads_for<T>(size, kRowBlock)), stream, logits, targets,
                first, statistics, rows, size, stride, aligned(logits, rows > 1 ? stride : 0));
}

template <typename T>
int cross_entropy_rows_gradient(T* logits, const int64_t* targets, int64_t first, const float* statistics,
                                const float* scale, float z_loss, int64_t rows, int64_t size, int64_t stride,
                                void* stream) {
  const bool whole = aligned(logits, rows > 1 ? stride : 0);
  const int width = whole ? kVector<T> : 1;
  const int64_t splits = ceil_divide(size, int64_t{kGradientBlock} * kGradientChunks * width);
  return launch(whole ? cross_entropy_rows_gradient_kernel<T, kVector<T>> : cross_entropy_rows_gradient_kernel<T, 1>,
                rows * splits, dim3(kGradientBlock), stream, logits, targets, first, statistics, scale, z_loss, rows,
                splits, size, stride);
}

template <typename T>
int cross_entropy(T* logits, const int64_t* targets, const float* scale, float z_loss, float* statistics, int64_t rows,
                  int64_t size, int64_t stride, void* stream) {
  const int threads = threads_for<T>(size, kOnePassBlock);
  const int64_t blocks = int64_t{multiprocessors()} * (kOnePassBlock / threads);
  return launch(cross_entropy_kernel<T>, rows < blocks ? rows : blocks, dim3(threads), stream, logits, targets, scale,
                z_loss, statistics, rows, size, stride, aligned(logits, rows > 1 ? stride : 0));
}

}  // namespace
}  // namespace megagap::gpu

extern "C" int megagap_gpu_cross_entropy_rows(int type, const void* logits, const int64_t* targets, int64_t first,
                                              float* statistics, int64_t rows, int64_t size, int64_t stride,
                                              void* stream) {
  if (size > megagap::gpu::kMaxRow) return kMegagapUnsupported;
  if (rows == 0) return 0;
  return megagap::gpu::for_type(type, [&](auto element) {
    return megagap::gpu::cross_entropy_rows(static_cast<const decltype(element)*>(logits), targets, first, statistics,
                                            rows, size, stride, stream);
  });
}

extern "C" int megagap_gpu_cross_entropy_rows_gradient(int type, void* logits, const int64_t* targets, int64_t first,
                                                       const float* statistics, const float* scale, float z_loss,
                                                       int64_t rows, int64_t size, int64_t stride, void* stream) {
  if (size > megagap::gpu::kMaxRow) return kMegagapUnsupported;
  if (rows == 0 || size == 0) return 0;
  return megagap::gpu::for_type(type, [&](auto element) {
    return megagap::gpu::cross_entropy_rows_gradient(static_cast<decltype(element)*>(logits), targets, first,
                                                     statistics, scale, z_loss, rows, size, stride, stream);
  });
}

extern "C" int megagap_gpu_cross_entropy(int type, void* logits, const int64_t* targets, const float* scale,
                                         float z_loss, float* statistics, int64_t rows, int64_t size, int64_t stride,
                                         void* stream) {
  if (size > megagap::gpu::kMaxRow) return kMegagapUnsupported;
  if (rows == 0) return 0;
  return megagap::gpu::for_type(type, [&](auto element) {
    return megagap::gpu::cross_entropy(static_cast<decltype(element)*>(logits), targets, scale, z_loss, statistics,
                                       rows, size, stride, stream);
  });
}
