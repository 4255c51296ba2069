// Elements of float, bfloat16 and half in memory, computed with in float, and their 16-byte accesses.
//
// The 16-bit types are their bits: HIP 5 has no bfloat16, and so both look alike on every platform.
#pragma once

#include "gpu/gpu_compat.h"

namespace megagap::gpu {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Bits16 {  // that are no number of their own
  uint16_t bits;
};

MEGAGAP_DEVICE float to_float(float value) { return value; }

MEGAGAP_DEVICE float to_float(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

MEGAGAP_DEVICE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#elif defined(__HIP_DEVICE_COMPILE__)
  return static_cast<float>(__builtin_bit_cast(_Float16, value.bits));
#else
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  const float magnitude = rest >= 0x400u ? __uint_as_float((rest << 13) + 0x38000000u)
                                         : static_cast<float>(rest) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
#endif
}

template <typename T>
MEGAGAP_DEVICE T from_float(float value);

template <>
MEGAGAP_DEVICE float from_float<float>(float value) {
  return value;
}

// To nearest, ties to even; NaN stays NaN.
template <>
MEGAGAP_DEVICE BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#else
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value == value ? rounded : 0x7fc0u)};
#endif
}

// To nearest, ties to even; too large becomes infinite.
template <>
MEGAGAP_DEVICE Half from_float<Half>(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#elif defined(__HIP_DEVICE_COMPILE__)
  return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(value))};
#else
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (rest < 0x38800000u) {  // a multiple of 2^-24: adding 1/2 leaves it, rounded, in the last bits of the sum
    const uint32_t steps = __float_as_uint(__uint_as_float(rest) + 0.5f) - __float_as_uint(0.5f);
    return {static_cast<uint16_t>(sign | steps)};
  }
  return {static_cast<uint16_t>(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13)};
#endif
}

// The value of x rounded to T.
template <typename T>
MEGAGAP_DEVICE float rounded(float x) {
  return to_float(from_float<T>(x));
}

MEGAGAP_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
MEGAGAP_DEVICE uint32_t bits_of(BFloat16 value) { return value.bits; }
MEGAGAP_DEVICE uint32_t bits_of(Half value) { return value.bits; }
MEGAGAP_DEVICE uint32_t bits_of(Bits16 value) { return value.bits; }

// kCount elements in 32-bit words, so that they stay in registers as they were in memory.
template <typename T, int kCount>
struct Chunk {
  static constexpr int kPerWord = 4 / sizeof(T), kWords = (kCount + kPerWord - 1) / kPerWord;
  uint32_t words[kWords];

  MEGAGAP_DEVICE float get(int i) const { return to_float(element(i)); }

  MEGAGAP_DEVICE T element(int i) const {
    if constexpr (kPerWord == 1) {
      return __uint_as_float(words[i]);
    } else {
      return T{static_cast<uint16_t>(i % 2 ? words[i / 2] >> 16 : words[i / 2])};
    }
  }

  // Elements are set in rising order, each once.
  MEGAGAP_DEVICE void set(int i, float value) { set_bits(i, bits_of(from_float<T>(value))); }

  MEGAGAP_DEVICE void set_bits(int i, uint32_t bits) {
    if constexpr (kPerWord == 1) {
      words[i] = bits;
    } else {
      words[i / 2] = i % 2 ? words[i / 2] | bits << 16 : bits;
    }
  }
};

// Elements of a 16-byte access.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// One element, or 8 bytes, or a multiple of 16 bytes, at an address that these (at most 16) divide.
template <int kCount, typename T>
MEGAGAP_DEVICE Chunk<T, kCount> load(const T* address) {
  constexpr int kBytes = kCount * sizeof(T);
  Chunk<T, kCount> chunk;
  if constexpr (kCount == 1) {
    chunk.set_bits(0, bits_of(*address));
  } else if constexpr (kBytes == 8) {
    const uint2 raw = *reinterpret_cast<const uint2*>(address);
    chunk.words[0] = raw.x;
    chunk.words[1] = raw.y;
  } else {
    static_assert(kBytes % 16 == 0, "accesses are of 8 or 16 bytes");
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 raw = reinterpret_cast<const uint4*>(address)[i];
      chunk.words[4 * i] = raw.x;
      chunk.words[4 * i + 1] = raw.y;
      chunk.words[4 * i + 2] = raw.z;
      chunk.words[4 * i + 3] = raw.w;
    }
  }
  return chunk;
}

// One store of 16 or 8 bytes. Left to itself, nvcc splits some into words, as the PTX of RMSNorm showed.
MEGAGAP_DEVICE void store_words(void* address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(__CUDA_ARCH__)
  // No clobbered memory: a thread reads what it wrote only behind a barrier, and loads may pass the stores of others.
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(a), "r"(b),
               "r"(c), "r"(d));
#else
  uint4 raw;
  raw.x = a;
  raw.y = b;
  raw.z = c;
  raw.w = d;
  *static_cast<uint4*>(address) = raw;
#endif
}

MEGAGAP_DEVICE void store_words(void* address, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "r"(a), "r"(b));
#else
  uint2 raw;
  raw.x = a;
  raw.y = b;
  *static_cast<uint2*>(address) = raw;
#endif
}

template <typename T, int kCount>
MEGAGAP_DEVICE void store(T* address, const Chunk<T, kCount>& chunk) {
  constexpr int kBytes = kCount * sizeof(T);
  const auto& words = chunk.words;
  if constexpr (kCount == 1) {
    *address = chunk.element(0);
  } else if constexpr (kBytes == 8) {
    store_words(address, words[0], words[1]);
  } else {
    static_assert(kBytes == 16, "accesses are of 8 or 16 bytes");
    store_words(address, words[0], words[1], words[2], words[3]);
  }
}

}  // namespace megagap::gpu
