// Vectors of W floats, W being that of torch's own kernels for the same instruction set. Included into a namespace of
// its own by each isa_*.cpp. Rows of any length: for_each_vector calls its body with whole vectors, then with a rest.

constexpr int64_t W = MEGAGAP_WIDTH;

typedef float Vec __attribute__((vector_size(4 * MEGAGAP_WIDTH)));
typedef uint32_t UVec __attribute__((vector_size(4 * MEGAGAP_WIDTH)));
typedef int32_t IVec __attribute__((vector_size(4 * MEGAGAP_WIDTH)));
typedef uint64_t LVec __attribute__((vector_size(8 * MEGAGAP_WIDTH)));
typedef uint16_t HVec __attribute__((vector_size(2 * MEGAGAP_WIDTH)));

struct Full {};  // in place of a count: a whole vector

template <typename Body>
MEGAGAP_INLINE void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    body(i, Full{});
  }
  if (i < size) {
    body(i, static_cast<int>(size - i));
  }
}

MEGAGAP_INLINE Vec broadcast(float value) { return Vec{} + value; }

template <typename To, typename From>
MEGAGAP_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- load and store

MEGAGAP_INLINE Vec load(const float* from, Full) {
  Vec result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

MEGAGAP_INLINE Vec load(const BFloat16* from, Full) {
  HVec half;
  std::memcpy(&half, from, sizeof(half));
  return bits_as<Vec>(__builtin_convertvector(half, UVec) << 16);
}

MEGAGAP_INLINE Vec load(const Half* from, Full) {
#if defined(MEGAGAP_AVX512)
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(MEGAGAP_AVX2)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Vec result;
  for (int64_t i = 0; i < W; ++i) {
    result[i] = to_float(from[i]);
  }
  return result;
#endif
}

MEGAGAP_INLINE UVec bfloat16_bits(Vec value) {
  const UVec bits = bits_as<UVec>(value);
  const UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UVec is_number = bits_as<UVec>(value == value);
  return (rounded & is_number) | (0x7fc0 & ~is_number);
}

MEGAGAP_INLINE void store(float* to, Vec value, Full) { std::memcpy(to, &value, sizeof(value)); }

MEGAGAP_INLINE void store(BFloat16* to, Vec value, Full) {
  const HVec half = __builtin_convertvector(bfloat16_bits(value), HVec);
  std::memcpy(to, &half, sizeof(half));
}

MEGAGAP_INLINE void store(Half* to, Vec value, Full) {
#if defined(MEGAGAP_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(reinterpret_cast<__m512>(value), 0));
#elif defined(MEGAGAP_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(reinterpret_cast<__m256>(value), 0));
#else
  for (int64_t i = 0; i < W; ++i) {
    to[i] = from_float<Half>(value[i]);
  }
#endif
}

// The rest of a row: count < W elements; lanes beyond are 0.
template <typename T>
MEGAGAP_INLINE Vec load(const T* from, int count) {
  T part[W] = {};
  std::memcpy(part, from, count * sizeof(T));
  return load(part, Full{});
}

template <typename T>
MEGAGAP_INLINE void store(T* to, Vec value, int count) {
  T part[W];
  store(part, value, Full{});
  std::memcpy(to, part, count * sizeof(T));
}

// value as T and back: what is left of it after rounding.
MEGAGAP_INLINE Vec rounded(Vec value, float) { return value; }
MEGAGAP_INLINE Vec rounded(Vec value, BFloat16) { return bits_as<Vec>(bfloat16_bits(value) << 16); }
MEGAGAP_INLINE Vec rounded(Vec value, Half) {
  Half part[W];
  store(part, value, Full{});
  return load(part, Full{});
}

// ---- arithmetic

MEGAGAP_INLINE float sum_of_lanes(Vec value) {
  float result = 0;
  for (int64_t i = 0; i < W; ++i) {
    result += value[i];
  }
  return result;
}

MEGAGAP_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

MEGAGAP_INLINE Vec sqrt(Vec value) {
#if defined(MEGAGAP_AVX512)
  return reinterpret_cast<Vec>(_mm512_sqrt_ps(reinterpret_cast<__m512>(value)));
#elif defined(MEGAGAP_AVX2)
  return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(value)));
#else
  for (int64_t i = 0; i < W; ++i) {
    value[i] = std::sqrt(value[i]);
  }
  return value;
#endif
}

// e^x within 2 units in the last place: e^r by its Taylor series, r = x - n ln 2 in [-0.35, 0.35], times 2^n. NaN stays
// NaN; below the smallest normal number the result is 0, above the largest it is the largest.
MEGAGAP_INLINE Vec exp(Vec given) {
  const Vec largest = broadcast(88.72283f), smallest = broadcast(-87.33654f);
  Vec x = largest < given ? largest : given;
  x = x < smallest ? smallest : x;
  const Vec shift = broadcast(12582912.0f);  // adding 1.5 * 2^23 rounds to a whole number
  Vec n = x * 1.44269504f + shift;
  // 2^127 is the largest power that the exponent's field holds: the upper half of the last octave is left to r.
  n -= shift;
  n = n > 127.0f ? broadcast(127.0f) : n;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IVec exponent = (__builtin_convertvector(n, IVec) + 127) << 23;
  const Vec result = p * bits_as<Vec>(exponent);
  return given < smallest ? Vec{} : result;
}
