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

// gcc splits these conversions in two, although the instruction sets have them as one.
MEGAGAP_INLINE UVec widened(HVec half) {
#if defined(MEGAGAP_AVX512)
  return reinterpret_cast<UVec>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(half)));
#elif defined(MEGAGAP_AVX2)
  return reinterpret_cast<UVec>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(half)));
#else
  return __builtin_convertvector(half, UVec);
#endif
}

MEGAGAP_INLINE HVec narrowed(UVec bits) {
#if defined(MEGAGAP_AVX512)
  return reinterpret_cast<HVec>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, HVec);
#endif
}

MEGAGAP_INLINE Vec load(const float* from, Full) {
  Vec result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

MEGAGAP_INLINE Vec load(const BFloat16* from, Full) {
  HVec half;
  std::memcpy(&half, from, sizeof(half));
  return bits_as<Vec>(widened(half) << 16);
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
  return value == value ? rounded : UVec{} + 0x7fc0;
}

MEGAGAP_INLINE void store(float* to, Vec value, Full) { std::memcpy(to, &value, sizeof(value)); }

MEGAGAP_INLINE void store(BFloat16* to, Vec value, Full) {
  const HVec half = narrowed(bfloat16_bits(value));
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

// 16-bit integers, zero-extended; what is stored fits.
MEGAGAP_INLINE UVec load_bits(const uint16_t* from, Full) {
  HVec half;
  std::memcpy(&half, from, sizeof(half));
  return widened(half);
}

MEGAGAP_INLINE void store_bits(uint16_t* to, UVec bits, Full) {
  const HVec half = narrowed(bits);
  std::memcpy(to, &half, sizeof(half));
}

MEGAGAP_INLINE UVec load_bits(const uint16_t* from, int count) {
  uint16_t part[W] = {};
  std::memcpy(part, from, count * sizeof(uint16_t));
  return load_bits(part, Full{});
}

MEGAGAP_INLINE void store_bits(uint16_t* to, UVec bits, int count) {
  uint16_t part[W];
  store_bits(part, bits, Full{});
  std::memcpy(to, part, count * sizeof(uint16_t));
}

// Non-temporal stores, for results that would not stay in cache: saves reading what is overwritten. to is aligned to
// the vector. Callers that stream call finish_streams() at the end.
template <typename T>
MEGAGAP_INLINE void stream(T* to, Vec value) {
  T part[W];
  store(part, value, Full{});
  constexpr int64_t kBytes = W * sizeof(T);
#if defined(MEGAGAP_AVX512)
  if constexpr (kBytes == 64) {
    __m512i bits;
    std::memcpy(&bits, part, kBytes);
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
  }
#endif
#if defined(MEGAGAP_AVX512) || defined(MEGAGAP_AVX2)
  if constexpr (kBytes == 32) {
    __m256i bits;
    std::memcpy(&bits, part, kBytes);
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
  }
#endif
  std::memcpy(to, part, kBytes);
}

MEGAGAP_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <bool kStream, typename T, typename Count>
MEGAGAP_INLINE void put(T* to, Vec value, Count count) {
  if constexpr (kStream && std::is_same_v<Count, Full>) {
    stream(to, value);
  } else {
    store(to, value, count);
  }
}

// Whether every row of a buffer starts at a vector boundary.
template <typename T>
MEGAGAP_INLINE bool can_stream(const T* rows, int64_t stride) {
  return reinterpret_cast<uintptr_t>(rows) % (W * sizeof(T)) == 0 && stride % W == 0;
}

// value converted to T and back: rounded to T.
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

// a * b + c, rounded once where the instruction set can: only where the last bit does not matter, or torch's does so.
MEGAGAP_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(MEGAGAP_AVX512)
  return reinterpret_cast<Vec>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                               reinterpret_cast<__m512>(c)));
#elif defined(MEGAGAP_AVX2)
  return reinterpret_cast<Vec>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                               reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

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
  Vec n = fma(x, broadcast(1.44269504f), shift) - shift;
  // 2^127 is the largest power that the exponent's field holds: the upper half of the last octave is left to r.
  n = n > 127.0f ? broadcast(127.0f) : n;
  const Vec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
  Vec p = fma(r, broadcast(1.0f / 5040), broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  const IVec exponent = (__builtin_convertvector(n, IVec) + 127) << 23;
  const Vec result = p * bits_as<Vec>(exponent);
  return given < smallest ? Vec{} : result;
}

// ---- integers

struct Product {
  UVec high, low;
};

// The 64-bit products of 32-bit numbers. gcc would multiply 64-bit numbers.
MEGAGAP_INLINE Product product(UVec x, uint32_t factor) {
#if defined(MEGAGAP_AVX512)
  const __m512i all = reinterpret_cast<__m512i>(x), by = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_mul_epu32(all, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(all, 32), by);
  return {reinterpret_cast<UVec>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)),
          reinterpret_cast<UVec>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)))};
#elif defined(MEGAGAP_AVX2)
  const __m256i all = reinterpret_cast<__m256i>(x), by = _mm256_set1_epi32(static_cast<int>(factor));
  const __m256i even = _mm256_mul_epu32(all, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(all, 32), by);
  return {reinterpret_cast<UVec>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)),
          reinterpret_cast<UVec>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa))};
#else
  const LVec wide = __builtin_convertvector(x, LVec) * factor;
  return {__builtin_convertvector(wide >> 32, UVec), x * factor};
#endif
}

// The place of each lane's words in what store_interleaved writes.
MEGAGAP_INLINE UVec interleaved_lanes() {
  UVec places;
  for (int64_t lane = 0; lane < W; ++lane) {
    places[lane] = static_cast<uint32_t>(lane % 4 * (W / 4) + lane / 4);
  }
  return places;
}

// a, b, c and d of one lane after those of another: the order that takes no exchange between parts of 128 bits.
MEGAGAP_INLINE void store_interleaved(uint32_t* to, UVec a, UVec b, UVec c, UVec d) {
#if defined(MEGAGAP_AVX512)
  const auto given = [](UVec x) { return reinterpret_cast<__m512i>(x); };
  const __m512i ab = _mm512_unpacklo_epi32(given(a), given(b)), cd = _mm512_unpacklo_epi32(given(c), given(d));
  const __m512i ab2 = _mm512_unpackhi_epi32(given(a), given(b)), cd2 = _mm512_unpackhi_epi32(given(c), given(d));
  const __m512i rows[4] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd),
                           _mm512_unpacklo_epi64(ab2, cd2), _mm512_unpackhi_epi64(ab2, cd2)};
  std::memcpy(to, rows, sizeof(rows));
#elif defined(MEGAGAP_AVX2)
  const auto given = [](UVec x) { return reinterpret_cast<__m256i>(x); };
  const __m256i ab = _mm256_unpacklo_epi32(given(a), given(b)), cd = _mm256_unpacklo_epi32(given(c), given(d));
  const __m256i ab2 = _mm256_unpackhi_epi32(given(a), given(b)), cd2 = _mm256_unpackhi_epi32(given(c), given(d));
  const __m256i rows[4] = {_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd),
                           _mm256_unpacklo_epi64(ab2, cd2), _mm256_unpackhi_epi64(ab2, cd2)};
  std::memcpy(to, rows, sizeof(rows));
#else
  const UVec places = interleaved_lanes();
  for (int64_t lane = 0; lane < W; ++lane) {
    uint32_t* words = to + 4 * places[lane];
    words[0] = a[lane];
    words[1] = b[lane];
    words[2] = c[lane];
    words[3] = d[lane];
  }
#endif
}
