// RMSNorm (Zhang & Sennrich 2019): y = gain * round(x * rstd), rstd = 1 / sqrt(mean(x^2) + eps), with the roundings of
// transformers' LlamaRMSNorm. gain = round(gain_scale * weight): Gaperon's trick for training in bfloat16 throughout.

// Lanes of the vectors in which torch adds up floats; on x86 its sums do not use AVX-512.
#if defined(__x86_64__)
constexpr int64_t kSumLanes = 8;
#else
constexpr int64_t kSumLanes = W;
#endif

// The sum of f over a row as torch adds up a row of floats, bit for bit: four vectors of kSumLanes in turn, whose sums
// are passed to the next level periodically (ATen/native/cpu/SumKernel.cpp), so that rounding errors grow with log(size).
template <typename F>
MEGAGAP_INLINE float cascade_sum(int64_t size, const F& f) {
  constexpr int kLevels = 4, kTurns = 4, kStep = kTurns * kSumLanes, kVectors = kStep / W;
  const int64_t steps = size / kStep;
  int64_t log2 = 0;
  while ((int64_t{1} << log2) < steps) {
    ++log2;
  }
  const int64_t power = log2 / kLevels > 4 ? log2 / kLevels : 4, mask = (int64_t{1} << power) - 1;
  Vec sums[kLevels][kVectors] = {};
  const auto add_step = [&](int64_t step) {
    for (int v = 0; v < kVectors; ++v) {
      sums[0][v] += f(step * kStep + v * W, Full{});
    }
  };
  int64_t i = 0;
  while (i + mask + 1 <= steps) {
    for (int64_t end = i + mask + 1; i < end; ++i) {
      add_step(i);
    }
    for (int level = 1; level < kLevels; ++level) {
      for (int v = 0; v < kVectors; ++v) {
        sums[level][v] += sums[level - 1][v];
        sums[level - 1][v] = Vec{};
      }
      if ((i & (mask << (level * power))) != 0) {
        break;
      }
    }
  }
  for (; i < steps; ++i) {
    add_step(i);
  }
  for (int level = 1; level < kLevels; ++level) {
    for (int v = 0; v < kVectors; ++v) {
      sums[0][v] += sums[level][v];
    }
  }
  float turns[kTurns][kSumLanes];
  std::memcpy(turns, sums[0], sizeof(turns));
  // The rest: whole vectors go to the first turn, single elements come first in the sum of the lanes.
  int64_t done = steps * kStep;
  float rest[kStep] = {};
  for (int64_t at = done; at < size; at += W) {
    const int64_t left = size - at;
    store(rest + (at - done), left >= W ? f(at, Full{}) : f(at, static_cast<int>(left)), Full{});
  }
  int64_t used = 0;
  for (; done + kSumLanes <= size; done += kSumLanes, used += kSumLanes) {
    for (int64_t lane = 0; lane < kSumLanes; ++lane) {
      turns[0][lane] += rest[used + lane];
    }
  }
  float result = 0;
  for (; done < size; ++done, ++used) {
    result += rest[used];
  }
  for (int64_t lane = 0; lane < kSumLanes; ++lane) {
    result += ((turns[0][lane] + turns[1][lane]) + turns[2][lane]) + turns[3][lane];
  }
  return result;
}

// gain_scale * weight, rounded to T, as floats; nothing to be done where they are floats unscaled.
template <typename T>
class Gains {
 public:
  Gains(const T* weight, int64_t size, float scale) {
    if constexpr (std::is_same_v<T, float>) {
      if (scale == 1) {
        values_ = weight;
        return;
      }
    }
    own_.reset(new float[size]);
    values_ = own_.get();
    for_each_vector(size, [&](int64_t i, auto count) {
      store(own_.get() + i, rounded(load(weight + i, count) * scale, T{}), count);
    });
  }

  const float* values() const { return values_; }

 private:
  std::unique_ptr<float[]> own_;
  const float* values_;
};

template <typename T, bool kStream>
void rms_norm_rows(const T* x, int64_t x_stride, const T* residual, const T* weight, T* y, T* total, float* rstd,
                   int64_t rows, int64_t size, float eps, float gain_scale) {
  const Gains<T> gains(weight, size, gain_scale);
  const float* gain = gains.values();
  for (int64_t row = 0; row < rows; ++row) {
    const T* normed = x + row * x_stride;
    if (residual) {
      T* sum = total + row * size;
      for_each_vector(size, [&](int64_t i, auto count) {
        store(sum + i, load(normed + i, count) + load(residual + row * size + i, count), count);
      });
      normed = sum;
    }
    const float squares = cascade_sum(size, [&](int64_t i, auto count) {
      const Vec value = load(normed + i, count);
      return value * value;
    });
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
    rstd[row] = scale;
    T* out = y + row * size;
    const T* next = x + (row + 1 < rows ? row + 1 : row) * x_stride;
    for_each_vector(size, [&](int64_t i, auto count) {
      __builtin_prefetch(next + i);  // reads memory while results are written
      put<kStream>(out + i, load(gain + i, count) * rounded(load(normed + i, count) * scale, T{}), count);
    });
  }
}

template <typename T>
void rms_norm(const T* x, int64_t x_stride, const T* residual, const T* weight, T* y, T* total, float* rstd,
              int64_t rows, int64_t size, float eps, float gain_scale, bool streaming) {
  if (streaming && can_stream(y, size)) {
    rms_norm_rows<T, true>(x, x_stride, residual, weight, y, total, rstd, rows, size, eps, gain_scale);
    return finish_streams();
  }
  rms_norm_rows<T, false>(x, x_stride, residual, weight, y, total, rstd, rows, size, eps, gain_scale);
}

// With n = x * rstd and g = grad * gain: grad_x = rstd * (g - n * mean(g * n)) + grad_total, and
// grad_weight = sum over rows of grad * round(n), which the caller multiplies with gain_scale.
template <typename T, bool kStream>
void rms_norm_rows_backward(const T* grad, const T* grad_total, const T* x, int64_t x_stride, const T* weight,
                            const float* rstd, T* grad_x, float* grad_weight, int64_t rows, int64_t size,
                            float gain_scale) {
  const Gains<T> gains(weight, size, gain_scale);
  const float* gain = gains.values();
  constexpr int64_t kTogether = 4;  // rows that stay in cache between the two passes
  for (int64_t first = 0; first < rows; first += kTogether) {
    const int64_t together = rows - first < kTogether ? rows - first : kTogether;
    Vec dots[kTogether] = {};
    const auto first_pass = [&](auto rows_now) {
      for_each_vector(size, [&](int64_t i, auto count) {
        const Vec gain_here = load(gain + i, count);
        Vec weight_sum = load(grad_weight + i, count);
        for (int64_t r = 0; r < rows_now; ++r) {
          const int64_t row = first + r;
          const Vec above = load(grad + row * size + i, count);
          const Vec normalised = load(x + row * x_stride + i, count) * rstd[row];
          dots[r] += above * gain_here * normalised;
          weight_sum += above * rounded(normalised, T{});
        }
        store(grad_weight + i, weight_sum, count);
      });
    };
    if (together == kTogether) {
      first_pass(std::integral_constant<int64_t, kTogether>{});
    } else {
      first_pass(together);
    }
    for (int64_t r = 0; r < together; ++r) {
      const int64_t row = first + r;
      const float scale = rstd[row], mean = sum_of_lanes(dots[r]) / static_cast<float>(size);
      T* out = grad_x + row * size;
      const int64_t next = row + kTogether < rows ? row + kTogether : row;
      for_each_vector(size, [&](int64_t i, auto count) {
        __builtin_prefetch(grad + next * size + i);
        __builtin_prefetch(x + next * x_stride + i);
        const Vec above = load(grad + row * size + i, count);
        const Vec normalised = load(x + row * x_stride + i, count) * scale;
        Vec result = scale * (above * load(gain + i, count) - normalised * mean);
        if (grad_total) {
          result += load(grad_total + row * size + i, count);
        }
        put<kStream>(out + i, result, count);
      });
    }
  }
}

template <typename T>
void rms_norm_backward(const T* grad, const T* grad_total, const T* x, int64_t x_stride, const T* weight,
                       const float* rstd, T* grad_x, float* grad_weight, int64_t rows, int64_t size, float gain_scale,
                       bool streaming) {
  if (streaming && can_stream(grad_x, size)) {
    rms_norm_rows_backward<T, true>(grad, grad_total, x, x_stride, weight, rstd, grad_x, grad_weight, rows, size,
                                    gain_scale);
    return finish_streams();
  }
  rms_norm_rows_backward<T, false>(grad, grad_total, x, x_stride, weight, rstd, grad_x, grad_weight, rows, size,
                                   gain_scale);
}
