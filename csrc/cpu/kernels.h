// CPU kernels over raw rows; csrc/bindings.cpp gives them tensors. One file an operation.
#pragma once

#include <cstdint>
#include <cstring>

// Compiles a function once for each instruction set and picks one when the library is loaded. What it calls must be
// inlined into it (MEGAGAP_INLINE) to be compiled for the same set.
#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__GNUC__) || defined(__clang__))
#define MEGAGAP_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MEGAGAP_CLONES
#endif
#define MEGAGAP_INLINE inline __attribute__((always_inline))

namespace megagap {

// A bfloat16 as its bits: arithmetic is in float, and plain shifts vectorise.
struct BFloat16 {
  uint16_t bits;
};

MEGAGAP_INLINE float to_float(float value) { return value; }

MEGAGAP_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename T>
MEGAGAP_INLINE T from_float(float value);

template <>
MEGAGAP_INLINE float from_float<float>(float value) { return value; }

// Rounds to nearest, ties to even; NaN stays NaN.
template <>
MEGAGAP_INLINE BFloat16 from_float<BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(value == value ? rounded : 0x7fc0)};
}

// Rows [begin, end) of x [rows, size]: y = weight * round(x * rstd), rstd [rows] = 1 / sqrt(mean(x^2) + eps).
void rms_norm_rows(const float* x, const float* weight, float* y, float* rstd, int64_t begin, int64_t end,
                   int64_t size, float eps);
void rms_norm_rows(const BFloat16* x, const BFloat16* weight, BFloat16* y, float* rstd, int64_t begin, int64_t end,
                   int64_t size, float eps);

// The gradient by x of rows [begin, end); their gradient by weight is written to grad_weight [size], in float.
void rms_norm_rows_backward(const float* grad, const float* x, const float* weight, const float* rstd, float* grad_x,
                            float* grad_weight, int64_t begin, int64_t end, int64_t size);
void rms_norm_rows_backward(const BFloat16* grad, const BFloat16* x, const BFloat16* weight, const float* rstd,
                            BFloat16* grad_x, float* grad_weight, int64_t begin, int64_t end, int64_t size);

// Tokens [begin, end) of x [tokens, heads, 2 * half]: y = x rotated by the angles of the token's position, which is its
// number modulo positions; cos, sin [positions, 2 * half]. Backward: y = x times the transposed rotations.
void rotary_rows(const float* x, const float* cos, const float* sin, float* y, int64_t begin, int64_t end,
                 int64_t heads, int64_t half, int64_t positions, bool backward);
void rotary_rows(const BFloat16* x, const float* cos, const float* sin, BFloat16* y, int64_t begin, int64_t end,
                 int64_t heads, int64_t half, int64_t positions, bool backward);

}  // namespace megagap
