// RMSNorm (Zhang & Sennrich 2019), alone or after a residual addition, with the roundings of transformers'
// LlamaRMSNorm: n = T(x * rstd), gain = T(gain_scale * weight), y = T(gain * n).
//
// A row belongs to a group of `lanes` threads, each of which keeps a few 16-byte chunks of it in registers, so that
// memory is read once. Short rows share a block; a row too long for kMaximumLanes threads is read twice.
#include "gpu/dispatch.h"
#include "gpu/elements.h"
#include "gpu/kernels.h"
#include "gpu/reduce.h"

namespace megagap::gpu {
namespace {

// Chunks that a thread holds of each row. Fewer where they are read element by element, which takes more registers.
template <typename T, bool kAligned>
constexpr int kHeldChunks = kAligned ? 4 : 8 / kVector<T>;

constexpr int kBlock = 256;                        // threads of a block whose rows need no more
constexpr int kMinimumLanes = 8, kMaximumLanes = 512;  // of a row: 128 contiguous bytes; 128 registers per thread
constexpr int kForwardBound = 768;                 // keeps registers at 80, so that three blocks share a multiprocessor
constexpr int kColumns = 32, kSlices = 32;         // of the block that sums the parts of a weight's gradient
constexpr int64_t kColumnParts = 64;               // of the weight's gradient where rows are too long for registers

// Element `i` of the chunk that a lane holds of the elements [begin, begin + lanes * kVector) of a row: neighbours in
// memory where chunks are read whole; else neighbouring lanes hold neighbouring elements.
template <typename T, bool kAligned>
MEGAGAP_DEVICE int column_of(int begin, int lane, int lanes, int i) {
  return kAligned ? begin + lane * kVector<T> + i : begin + i * lanes + lane;
}

// Zeros beyond the row's end.
template <bool kAligned, typename T>
MEGAGAP_DEVICE Chunk<T, kVector<T>> load_part(const T* row, int begin, int lane, int lanes, int size) {
  Chunk<T, kVector<T>> chunk = {};
  if constexpr (kAligned) {
    const int column = column_of<T, true>(begin, lane, lanes, 0);
    if (column < size) chunk = load<kVector<T>>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const int column = column_of<T, false>(begin, lane, lanes, i);
      chunk.set_bits(i, column < size ? bits_of(row[column]) : 0);
    }
  }
  return chunk;
}

template <bool kAligned, typename T>
MEGAGAP_DEVICE void store_part(T* row, const Chunk<T, kVector<T>>& chunk, int begin, int lane, int lanes, int size) {
  if constexpr (kAligned) {
    const int column = column_of<T, true>(begin, lane, lanes, 0);
    if (column < size) store(row + column, chunk);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const int column = column_of<T, false>(begin, lane, lanes, i);
      if (column < size) row[column] = chunk.element(i);
    }
  }
}

template <typename T, bool kAligned, bool kResidual>
__global__ void __launch_bounds__(kForwardBound, 1)
    rms_norm_kernel(const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ weight,
                    T* __restrict__ y, T* total, float* __restrict__ rstd, int64_t rows, int size, int lanes, float eps,
                    float gain_scale) {
  constexpr int kHeld = kHeldChunks<T, kAligned>;
  __shared__ float shared[2][kMaxWaves];
  const int lane = static_cast<int>(threadIdx.x) % lanes, step = lanes * kVector<T>;
  const int groups = static_cast<int>(blockDim.x) / lanes, group = static_cast<int>(threadIdx.x) / lanes;
  int turn = 0;
  for (int64_t first = int64_t{blockIdx.x} * groups; first < rows; first += int64_t{gridDim.x} * groups, turn ^= 1) {
    const int64_t row = first + group;
    const int length = row < rows ? size : 0;
    const int64_t offset = row * size;
    Chunk<T, kVector<T>> held[kHeld];
    float squares = 0;
    for (int begin = 0; begin < size; begin += kHeld * step) {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        held[k] = load_part<kAligned>(x + offset, begin + k * step, lane, lanes, length);
      }
      if constexpr (kResidual) {
        Chunk<T, kVector<T>> other[kHeld];
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          other[k] = load_part<kAligned>(residual + offset, begin + k * step, lane, lanes, length);
        }
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          Chunk<T, kVector<T>> added;
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) added.set(i, held[k].get(i) + other[k].get(i));
          held[k] = added;
          store_part<kAligned>(total + offset, added, begin + k * step, lane, lanes, length);
        }
      }
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) squares += held[k].get(i) * held[k].get(i);
      }
    }
    squares = reduce_group<Sum>(squares, lanes, shared[turn]);
    const float scale = rsqrtf(squares / static_cast<float>(size) + eps);
    if (lane == 0 && row < rows) rstd[row] = scale;
    for (int begin = 0; begin < size; begin += kHeld * step) {
      if (size > kHeld * step) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          held[k] = load_part<kAligned>((kResidual ? total : x) + offset, begin + k * step, lane, lanes, length);
        }
      }
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const auto weights = load_part<kAligned>(weight, begin + k * step, lane, lanes, length);
        Chunk<T, kVector<T>> result;
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          const float normalised = rounded<T>(held[k].get(i) * scale);
          result.set(i, rounded<T>(gain_scale * weights.get(i)) * normalised);
        }
        store_part<kAligned>(y + offset, result, begin + k * step, lane, lanes, length);
      }
    }
  }
}

// With v = x * rstd and g = grad * gain: grad_x = rstd * (g - v * mean(g * v)) + grad_total. Every block takes rows a
// grid apart and leaves its sum of grad * T(v) in partial[block]; it stays in registers until then.
template <typename T, bool kAligned, bool kResidual>
__global__ void __launch_bounds__(kMaximumLanes, 1)
    rms_norm_backward_kernel(const T* __restrict__ grad, const T* __restrict__ grad_total, const T* __restrict__ x,
                             const T* __restrict__ weight, const float* __restrict__ rstd, T* __restrict__ grad_x,
                             float* __restrict__ partial, int64_t rows, int size, int lanes, float gain_scale) {
  constexpr int kHeld = kHeldChunks<T, kAligned>, kSums = kHeld * kVector<T>;
  __shared__ float shared[2][kMaxWaves];
  __shared__ float sums[kSums][kBlock / 2];
  const int lane = static_cast<int>(threadIdx.x) % lanes, step = lanes * kVector<T>;
  const int groups = static_cast<int>(blockDim.x) / lanes, group = static_cast<int>(threadIdx.x) / lanes;

  float sum[kSums] = {};

  int turn = 0;
  for (int64_t first = int64_t{blockIdx.x} * groups; first < rows; first += int64_t{gridDim.x} * groups, turn ^= 1) {
    const int64_t row = first + group;
    const int length = row < rows ? size : 0;
    const int64_t offset = row * size;
    const float scale = row < rows ? rstd[row] : 0;
    Chunk<T, kVector<T>> held[kHeld], above[kHeld], added[kHeld];  // the weight stays in the L1 cache
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      held[k] = load_part<kAligned>(x + offset, k * step, lane, lanes, length);
      above[k] = load_part<kAligned>(grad + offset, k * step, lane, lanes, length);
    }
    float dot = 0;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const auto weights = load_part<kAligned>(weight, k * step, lane, lanes, length);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        const float value = held[k].get(i) * scale;
        dot += above[k].get(i) * rounded<T>(gain_scale * weights.get(i)) * value;
        sum[k * kVector<T> + i] += above[k].get(i) * rounded<T>(value);
      }
    }
    if constexpr (kResidual) {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        added[k] = load_part<kAligned>(grad_total + offset, k * step, lane, lanes, length);
      }
    }
    const float mean = reduce_group<Sum>(dot, lanes, shared[turn]) / static_cast<float>(size);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const auto weights = load_part<kAligned>(weight, k * step, lane, lanes, length);
      Chunk<T, kVector<T>> result;
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        const float value = held[k].get(i) * scale;
        float gradient = scale * (above[k].get(i) * rounded<T>(gain_scale * weights.get(i)) - value * mean);
        if constexpr (kResidual) gradient += added[k].get(i);
        result.set(i, gradient);
      }
      store_part<kAligned>(grad_x + offset, result, k * step, lane, lanes, length);
    }
  }

  // The groups' sums are added pairwise. A block with more than one group has kBlock threads.
  for (int half = groups / 2; half > 0; half /= 2) {
    const int slot = static_cast<int>(threadIdx.x) % (half * lanes);
    block_barrier();
    if (group >= half && group < 2 * half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i][slot] = sum[i];
    }
    block_barrier();
    if (group < half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] += sums[i][slot];
    }
  }
  if (group == 0) {
    float* part = partial + int64_t{blockIdx.x} * size;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        const int column = column_of<T, kAligned>(k * step, lane, lanes, i);
        if (column < size) part[column] = sum[k * kVector<T> + i];
      }
    }
  }
}

// The gradient of x for rows that are too long for registers: read twice, element by element.
template <typename T>
__global__ void __launch_bounds__(1024)
    rms_norm_long_rows_kernel(const T* __restrict__ grad, const T* __restrict__ grad_total, const T* __restrict__ x,
                              const T* __restrict__ weight, const float* __restrict__ rstd, T* __restrict__ grad_x,
                              int64_t rows, int size, float gain_scale) {
  __shared__ float shared[2][kMaxWaves];
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
    const int64_t offset = row * size;
    const float scale = rstd[row];
    float dot = 0;
    for (int i = thread; i < size; i += threads) {
      dot += to_float(grad[offset + i]) * rounded<T>(gain_scale * to_float(weight[i])) * to_float(x[offset + i]) * scale;
    }
    const float mean = reduce_group<Sum>(dot, threads, shared[turn]) / static_cast<float>(size);
    for (int i = thread; i < size; i += threads) {
      const float wanted = to_float(grad[offset + i]) * rounded<T>(gain_scale * to_float(weight[i]));
      const float gradient = scale * (wanted - to_float(x[offset + i]) * scale * mean);
      grad_x[offset + i] = from_float<T>(grad_total ? gradient + to_float(grad_total[offset + i]) : gradient);
    }
  }
}

// And of their weight: a thread sums a column over every parts-th row.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    rms_norm_columns_kernel(const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ rstd,
                            float* __restrict__ partial, int64_t parts, int64_t rows, int size) {
  const int64_t threads = parts * size;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < threads; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t part = i / size, column = i - part * size;
    float sum = 0;
    for (int64_t row = part; row < rows; row += parts) {
      sum += to_float(grad[row * size + column]) * rounded<T>(to_float(x[row * size + column]) * rstd[row]);
    }
    partial[i] = sum;
  }
}

// grad_weight = gain_scale * sum over parts. Slices of the parts are summed by a thread each, then pairwise.
template <typename T>
__global__ void __launch_bounds__(kColumns* kSlices)
    sum_parts_kernel(const float* __restrict__ partial, T* __restrict__ grad_weight, int64_t parts, int size,
                     float gain_scale) {
  __shared__ float sums[kSlices][kColumns];
  const int slice = static_cast<int>(threadIdx.y);
  for (int64_t first = int64_t{blockIdx.x} * kColumns; first < size; first += int64_t{gridDim.x} * kColumns) {
    const int64_t column = first + threadIdx.x;
    float sum = 0;
    if (column < size) {
#pragma unroll 8
      for (int64_t part = slice; part < parts; part += kSlices) sum += partial[part * size + column];
    }
    sums[slice][threadIdx.x] = sum;
    for (int half = kSlices / 2; half > 0; half /= 2) {
      block_barrier();
      if (slice < half) sums[slice][threadIdx.x] += sums[slice + half][threadIdx.x];
    }
    if (slice == 0 && column < size) grad_weight[column] = from_float<T>(gain_scale * sums[0][threadIdx.x]);
    block_barrier();
  }
}

// Elements of a row that a thread holds.
template <typename T>
int64_t elements_held(bool whole) {
  return kVector<T> * (whole ? kHeldChunks<T, true> : kHeldChunks<T, false>);
}

// Threads for a row: a power of two, as few as hold it.
template <typename T>
int lanes_for(int64_t size, bool whole) {
  int lanes = kMinimumLanes;
  while (lanes < kMaximumLanes && lanes * elements_held<T>(whole) < size) lanes *= 2;
  return lanes;
}

int block_for(int lanes) { return lanes > kBlock ? lanes : kBlock; }

template <typename T>
int rms_norm(const T* x, const T* residual, const T* weight, T* y, T* total, float* rstd, int64_t rows, int64_t size,
             float eps, float gain_scale, void* stream) {
  const bool whole = aligned(x, size) && aligned(weight) && aligned(y) && aligned(total) && aligned(residual);
  const int lanes = lanes_for<T>(size, whole), block = block_for(lanes);
  auto* kernel = residual ? (whole ? rms_norm_kernel<T, true, true> : rms_norm_kernel<T, false, true>)
                          : (whole ? rms_norm_kernel<T, true, false> : rms_norm_kernel<T, false, false>);
  return launch(kernel, ceil_divide(rows, block / lanes), dim3(block), stream, x, residual, weight, y, total, rstd, rows,
                size, lanes, eps, gain_scale);
}

// Just enough blocks to keep the device busy: each costs a row of the workspace, written and read.
template <typename T>
int64_t rms_norm_parts(int64_t rows, int64_t size) {
  if (size > kMaximumLanes * elements_held<T>(true)) return rows < kColumnParts ? rows : kColumnParts;
  const int lanes = lanes_for<T>(size, true);
  const int64_t blocks = ceil_divide(rows, block_for(lanes) / lanes), enough = 2 * int64_t{multiprocessors()};
  return blocks < enough ? blocks : enough;
}

template <typename T>
int rms_norm_backward(const T* grad, const T* grad_total, const T* x, const T* weight, const float* rstd, T* grad_x,
                      T* grad_weight, float* partial, int64_t parts, int64_t rows, int64_t size, float gain_scale,
                      void* stream) {
  const bool whole =
      aligned(grad, size) && aligned(grad_total) && aligned(x) && aligned(weight) && aligned(grad_x);
  int error = 0;
  if (rows == 0) {
    parts = 0;
  } else if (size <= kMaximumLanes * elements_held<T>(whole)) {
    const int lanes = lanes_for<T>(size, whole);
    auto* kernel = grad_total
                       ? (whole ? rms_norm_backward_kernel<T, true, true> : rms_norm_backward_kernel<T, false, true>)
                       : (whole ? rms_norm_backward_kernel<T, true, false> : rms_norm_backward_kernel<T, false, false>);
    error = launch(kernel, parts, dim3(block_for(lanes)), stream, grad, grad_total, x, weight, rstd, grad_x, partial,
                   rows, size, lanes, gain_scale);
  } else {
    error = launch(rms_norm_long_rows_kernel<T>, rows, dim3(1024), stream, grad, grad_total, x, weight, rstd, grad_x,
                   rows, size, gain_scale);
    if (error == 0) {
      error = launch(rms_norm_columns_kernel<T>, ceil_divide(parts * size, kBlock), dim3(kBlock), stream, grad, x, rstd,
                     partial, parts, rows, size);
    }
  }
  if (error != 0) return error;
  return launch(sum_parts_kernel<T>, ceil_divide(size, kColumns), dim3(kColumns, kSlices), stream, partial, grad_weight,
                parts, size, gain_scale);
}

}  // namespace
}  // namespace megagap::gpu

extern "C" const char* megagap_gpu_error(int code) {
  return code == kMegagapUnsupported ? "no kernel for this element type or row length" : megagap::gpu::error_text(code);
}

extern "C" int megagap_gpu_rms_norm(int type, const void* x, const void* residual, const void* weight, void* y,
                                    void* total, float* rstd, int64_t rows, int64_t size, float eps, float gain_scale,
                                    void* stream) {
  if (size > megagap::gpu::kMaxRow) return kMegagapUnsupported;
  if (rows == 0 || size == 0) return 0;
  return megagap::gpu::for_type(type, [&](auto element) {
    using T = decltype(element);
    return megagap::gpu::rms_norm(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
                             static_cast<T*>(y), static_cast<T*>(total), rstd, rows, size, eps, gain_scale, stream);
  });
}

extern "C" int64_t megagap_gpu_rms_norm_parts(int type, int64_t rows, int64_t size) {
  return megagap::gpu::for_type(type, [&](auto element) { return megagap::gpu::rms_norm_parts<decltype(element)>(rows, size); });
}

extern "C" int megagap_gpu_rms_norm_backward(int type, const void* grad, const void* grad_total, const void* x,
                                             const void* weight, const float* rstd, void* grad_x, void* grad_weight,
                                             float* partial, int64_t parts, int64_t rows, int64_t size,
                                             float gain_scale, void* stream) {
  if (size > megagap::gpu::kMaxRow) return kMegagapUnsupported;
  if (size == 0) return 0;
  return megagap::gpu::for_type(type, [&](auto element) {
    using T = decltype(element);
    return megagap::gpu::rms_norm_backward(static_cast<const T*>(grad), static_cast<const T*>(grad_total),
                                      static_cast<const T*>(x), static_cast<const T*>(weight), rstd,
                                      static_cast<T*>(grad_x), static_cast<T*>(grad_weight), partial, parts, rows, size,
                                      gain_scale, stream);
  });
}
