// AdamW (Loshchilov & Hutter 2019, algorithm 2) over flat buffers in one pass, as torch.optim.AdamW orders it. A
// parameter in bfloat16 has an exact remainder, or is rounded to the nearest, or stochastically (Gupta et al. 2015,
// section 3.1), which preserves updates below half a unit on average.

// Philox4x32-10 (Salmon et al. 2011): the four words of each of W consecutive counters, one after the other. A pure
// function of key, step, stream and counter, so that it depends on neither threads nor slices.
MEGAGAP_INLINE void random_words(uint64_t key, uint32_t step, uint32_t stream, uint64_t first_counter,
                                 uint32_t* words) {
  const uint32_t low = static_cast<uint32_t>(first_counter), high = static_cast<uint32_t>(first_counter >> 32);
  UVec c0 = interleaved_lanes() + low, c2 = UVec{} + step, c3 = UVec{} + stream;
  UVec c1 = high - bits_as<UVec>(c0 < low);  // a comparison that holds is -1: the carry
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
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

// Up or down with probabilities such that the mean is the value itself; values that are not finite are unchanged.
MEGAGAP_INLINE Vec stochastically_rounded(Vec value, UVec random) {
  const UVec bits = bits_as<UVec>(value);
  const UVec is_finite = bits_as<UVec>((bits & 0x7f800000) != 0x7f800000);
  return bits_as<Vec>((((bits + (random & 0xffff)) & is_finite) | (bits & ~is_finite)) & 0xffff0000);
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
    store(elements + i, stochastically_rounded(value, load_bits(random + i, Full{})), count);
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

template <typename Parameter>
MEGAGAP_INLINE void adamw_run(const Parameter& parameter, float* exp_avg, float* exp_avg_sq, const float* grad,
                              int64_t size, const AdamW form) {
  const float step_size = form.lr / form.first_correction, second_root = std::sqrt(form.second_correction);
  const float kept = 1.0f - form.lr * form.weight_decay;
  for_each_vector(size, [&](int64_t i, auto count) {
    const Vec g = load(grad + i, count) / form.grad_divisor;
    const Vec m_before = load(exp_avg + i, count);
    const Vec m = m_before + (g - m_before) * (1.0f - form.beta1);
    const Vec v = load(exp_avg_sq + i, count) * form.beta2 + (1.0f - form.beta2) * (g * g);
    const Vec decayed = parameter.get(i, count) * kept;
    store(exp_avg + i, m, count);
    store(exp_avg_sq + i, v, count);
    parameter.set(i, decayed - step_size * (m / (sqrt(v) / second_root + form.eps)), count);
  });
}

// Stochastically, in runs of elements that are neighbours in the global tensor, too. A counter has two bytes for each
// of eight of them.
inline void adamw_stochastic(BFloat16* parameter, float* exp_avg, float* exp_avg_sq, const float* grad, int64_t first,
                             int64_t size, const AdamW& form) {
  constexpr int64_t kRun = 1024, kShare = 8;
  uint32_t words[(kRun + kShare + kShare * W + W) / 2] = {};
  const Rounding& place = form.rounding;
  for (int64_t i = first, size_of_run; i < first + size; i += size_of_run) {
    const int64_t row = (place.first + i) / place.columns, column = (place.first + i) % place.columns;
    const int64_t element = place.offset + row * place.pitch + column, skipped = element % kShare;
    const int64_t left_in_row = place.columns == place.pitch ? kRun : place.columns - column;
    size_of_run = std::min({first + size - i, left_in_row, kRun});
    for (int64_t done = 0; done < skipped + size_of_run; done += kShare * W) {
      random_words(static_cast<uint64_t>(place.key), form.step, 0,
                   static_cast<uint64_t>((element + done) / kShare), words + done / 2);
    }
    const Stochastic run{parameter + i, reinterpret_cast<const uint16_t*>(words) + skipped};
    adamw_run(run, exp_avg + i, exp_avg_sq + i, grad + i, size_of_run, form);
  }
}

template <typename T>
void adamw(T* parameter, uint16_t* remainder, float* exp_avg, float* exp_avg_sq, const float* grad, int64_t first,
           int64_t size, const AdamW& given) {
  const AdamW form = given;  // a copy: as far as the compiler knows, stores to the buffers might change the one given
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (remainder != nullptr) {
      const WithRemainder run{parameter + first, remainder + first};
      return adamw_run(run, exp_avg + first, exp_avg_sq + first, grad + first, size, form);
    }
    if (form.stochastic) {
      return adamw_stochastic(parameter, exp_avg, exp_avg_sq, grad, first, size, form);
    }
  }
  adamw_run(Nearest<T>{parameter + first}, exp_avg + first, exp_avg_sq + first, grad + first, size, form);
}
