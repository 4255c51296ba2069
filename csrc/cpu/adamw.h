// AdamW (Loshchilov & Hutter 2019, algorithm 2) over flat buffers in one pass, with the roundings of torch's fused form. A
// parameter in bfloat16 has an exact remainder, or is rounded to the nearest, or stochastically (Gupta et al. 2015,
// section 3.1), which preserves updates below half a unit on average.

// Philox4x32-7 (Salmon et al. 2011): the four words of each of W consecutive counters, one after the other. A pure
// function of key, step, stream and counter, so that it depends on neither threads nor slices.
MEGAGAP_INLINE void random_words(uint64_t key, uint32_t step, uint32_t stream, uint64_t first_counter,
                                 uint32_t* words) {
  const uint32_t low = static_cast<uint32_t>(first_counter), high = static_cast<uint32_t>(first_counter >> 32);
  UVec c0 = interleaved_lanes() + low, c2 = UVec{} + step, c3 = UVec{} + stream;
  UVec c1 = high - bits_as<UVec>(c0 < low);  // a comparison that holds is -1: the carry
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 7; ++round) {
    const Product first = product(c0, 0xD2511F53u), second = product(c2, 0xCD9E8D57u);
    c0 = second.high ^ c1 ^ k0;
    c1 = second.low;
    c2 = first.high ^ c3 ^ k1;
    c3 = first.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  store_interleaved(words, c0, c1, c2, c3);
}

// Up or down to a bfloat16 with probabilities such that the mean is the value itself. random: 16 bits each.
template <typename Count>
MEGAGAP_INLINE void store_at_random(BFloat16* to, Vec value, UVec random, Count count) {
  const UVec bits = (bits_as<UVec>(value) + random) >> 16;  // an infinity stays what it is
  store_bits(&to->bits, value == value ? bits : UVec{} + 0x7fc0, count);
}

// ---- how the elements of a run are kept

template <typename T>
struct Nearest {
  T* elements;

  template <typename Count>
  MEGAGAP_INLINE Vec get(int64_t i, Count count) const {
    return load(elements + i, count);
  }
  template <typename Count>
  MEGAGAP_INLINE void set(int64_t i, Vec value, Count count) const {
    store(elements + i, value, count);
  }
};

struct Stochastic {
  BFloat16* elements;
  const uint16_t* random;  // of each element, and of a vector more

  template <typename Count>
  MEGAGAP_INLINE Vec get(int64_t i, Count count) const {
    return load(elements + i, count);
  }
  template <typename Count>
  MEGAGAP_INLINE void set(int64_t i, Vec value, Count count) const {
    store_at_random(elements + i, value, load_bits(random + i, Full{}), count);
  }
};

// float in two halves, as ops/remainder.py defines them.
struct WithRemainder {
  BFloat16* elements;
  uint16_t* remainder;

  template <typename Count>
  MEGAGAP_INLINE Vec get(int64_t i, Count count) const {
    const UVec low = load_bits(remainder + i, count);
    return bits_as<Vec>(bits_as<UVec>(load(elements + i, count)) + (low ^ 0x8000) - 0x8000);  // its sign extended
  }
  template <typename Count>
  MEGAGAP_INLINE void set(int64_t i, Vec value, Count count) const {
    const UVec bits = value == value ? bits_as<UVec>(value) : UVec{} + 0x7fc00000;
    store_bits(&elements[i].bits, (bits + 0x8000) >> 16, count);
    store_bits(remainder + i, bits & 0xffff, count);
  }
};

// Both moments. words: of each element, and of a vector more, random bits: the lower half for the first moment.
template <typename M, bool kStochastic>
struct Moments {
  M *exp_avg, *exp_avg_sq;
  const uint32_t* words;

  template <typename Count>
  MEGAGAP_INLINE void set(int64_t i, Vec first, Vec second, Count count) const {
    if constexpr (std::is_same_v<M, BFloat16> && kStochastic) {
      UVec random;
      std::memcpy(&random, words + i, sizeof(random));
      store_at_random(exp_avg + i, first, random & 0xffff, count);
      store_at_random(exp_avg_sq + i, second, random >> 16, count);
    } else {
      store(exp_avg + i, first, count);
      store(exp_avg_sq + i, second, count);
    }
  }
};

template <typename Parameter, typename Moments, typename G>
MEGAGAP_INLINE void adamw_run(const Parameter& parameter, const Moments& moments, const G* grad, int64_t size,
                              const AdamW form) {
  // As torch's lerp: from the nearer end.
  const bool near = form.take1 < 0.5f;
  const Vec weight = broadcast(near ? form.take1 : form.take1 - 1.0f);
  for_each_vector(size, [&](int64_t i, auto count) {
    const Vec g = load(grad + i, count) / form.grad_divisor;
    const Vec m_before = load(moments.exp_avg + i, count);
    const Vec m = fma(weight, g - m_before, near ? m_before : g);
    const Vec v = fma(form.take2 * g, g, load(moments.exp_avg_sq + i, count) * form.keep2);
    const Vec decayed = parameter.get(i, count) * form.kept;
    moments.set(i, m, v, count);
    parameter.set(i, decayed + -form.step_size * m / (sqrt(v) / form.root2 + form.eps), count);
  });
}

constexpr int64_t kRun = 1024;

// Random bits of a run of elements that are neighbours in the global tensor, too; a counter has those of kShare.
template <int64_t kShare>
struct RandomBits {
  uint32_t words[4 * ((kRun + kShare) / kShare + 2 * W)];

  // Returns how many elements before `element` they begin.
  MEGAGAP_INLINE int64_t fill(const AdamW& form, uint32_t stream, int64_t element, int64_t size) {
    const int64_t skipped = element % kShare;
    for (int64_t done = 0; done < skipped + size; done += kShare * W) {
      random_words(static_cast<uint64_t>(form.rounding.key), form.step, stream,
                   static_cast<uint64_t>((element + done) / kShare), words + done * 4 / kShare);
    }
    return skipped;
  }
};

// The update of elements [first, first + size) in runs, where some of what they are kept in is rounded stochastically.
template <typename T, typename M, typename G>
MEGAGAP_INLINE void adamw_stochastic(T* parameter, uint16_t* remainder, M* exp_avg, M* exp_avg_sq, const G* grad,
                                     int64_t first, int64_t size, const AdamW form) {
  RandomBits<8> of_parameter = {};  // stream 0
  RandomBits<4> of_moments = {};    // stream 1
  const Rounding& place = form.rounding;
  for (int64_t i = first, size_of_run; i < first + size; i += size_of_run) {
    const int64_t row = (place.first + i) / place.columns, column = (place.first + i) % place.columns;
    const int64_t element = place.offset + row * place.pitch + column;
    const int64_t left_in_row = place.columns == place.pitch ? kRun : place.columns - column;
    size_of_run = std::min({first + size - i, left_in_row, kRun});
    Moments<M, true> moments{exp_avg + i, exp_avg_sq + i, nullptr};
    if constexpr (std::is_same_v<M, BFloat16>) {
      moments.words = of_moments.words + of_moments.fill(form, 1, element, size_of_run);
    }
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (remainder != nullptr) {
        adamw_run(WithRemainder{parameter + i, remainder + i}, moments, grad + i, size_of_run, form);
      } else {
        const int64_t skipped = of_parameter.fill(form, 0, element, size_of_run);
        const Stochastic run{parameter + i, reinterpret_cast<const uint16_t*>(of_parameter.words) + skipped};
        adamw_run(run, moments, grad + i, size_of_run, form);
      }
    } else {
      adamw_run(Nearest<T>{parameter + i}, moments, grad + i, size_of_run, form);
    }
  }
}

template <typename T, typename M, typename G>
void adamw(T* parameter, uint16_t* remainder, M* exp_avg, M* exp_avg_sq, const G* grad, int64_t first, int64_t size,
           const AdamW& given) {
  const AdamW form = given;  // a copy: as far as the compiler knows, stores to the buffers might change the one given
  if (form.stochastic) {
    return adamw_stochastic(parameter, remainder, exp_avg, exp_avg_sq, grad, first, size, form);
  }
  const Moments<M, false> moments{exp_avg + first, exp_avg_sq + first, nullptr};
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (remainder != nullptr) {
      return adamw_run(WithRemainder{parameter + first, remainder + first}, moments, grad + first, size, form);
    }
  }
  adamw_run(Nearest<T>{parameter + first}, moments, grad + first, size, form);
}
