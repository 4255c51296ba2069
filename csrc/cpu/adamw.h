// AdamW (Loshchilov & Hutter 2019, algorithm 2) over flat buffers in one pass, as torch.optim.AdamW orders it. A
// parameter in half precision has no other master: it is rounded to the nearest, or stochastically (Gupta et al. 2015,
// section 3.1), which preserves updates below half a unit on average.

// Philox4x32-10 (Salmon et al. 2011): the four words of each of W consecutive counters, one after the other. A pure
// function of key, step and counter, so that it depends on neither threads nor slices.
MEGAGAP_INLINE void random_words(uint64_t key, uint32_t step, uint64_t first_counter, uint32_t* words) {
  LVec counter;
  for (int64_t lane = 0; lane < W; ++lane) {
    counter[lane] = first_counter + lane;
  }
  UVec c0 = __builtin_convertvector(counter & 0xffffffff, UVec), c1 = __builtin_convertvector(counter >> 32, UVec);
  UVec c2 = UVec{} + step, c3 = {};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const LVec product0 = __builtin_convertvector(c0, LVec) * 0xD2511F53u;
    const LVec product1 = __builtin_convertvector(c2, LVec) * 0xCD9E8D57u;
    const UVec high0 = __builtin_convertvector(product0 >> 32, UVec), low0 = c0 * 0xD2511F53u;
    const UVec high1 = __builtin_convertvector(product1 >> 32, UVec), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int64_t lane = 0; lane < W; ++lane) {
    words[4 * lane] = c0[lane];
    words[4 * lane + 1] = c1[lane];
    words[4 * lane + 2] = c2[lane];
    words[4 * lane + 3] = c3[lane];
  }
}

// Up or down with probabilities such that the mean is the value itself; values that are not finite are unchanged.
MEGAGAP_INLINE Vec stochastically_rounded(Vec value, UVec random) {
  const UVec bits = bits_as<UVec>(value);
  const UVec is_finite = bits_as<UVec>((bits & 0x7f800000) != 0x7f800000);
  return bits_as<Vec>((((bits + (random & 0xffff)) & is_finite) | (bits & ~is_finite)) & 0xffff0000);
}

// Elements [first, first + size); words: null, or a random one for each of them.
template <typename T>
MEGAGAP_INLINE void adamw_run(T* parameter, float* exp_avg, float* exp_avg_sq, const float* grad, int64_t first,
                              int64_t size, const AdamW& form, const uint32_t* words) {
  const float step_size = form.lr / form.first_correction, second_root = std::sqrt(form.second_correction);
  const float kept = 1.0f - form.lr * form.weight_decay;
  for_each_vector(size, [&](int64_t offset, auto count) {
    const int64_t i = first + offset;
    const Vec g = load(grad + i, count) / form.grad_divisor;
    const Vec m_before = load(exp_avg + i, count);
    const Vec m = m_before + (g - m_before) * (1.0f - form.beta1);
    const Vec v = load(exp_avg_sq + i, count) * form.beta2 + (1.0f - form.beta2) * (g * g);
    const Vec decayed = load(parameter + i, count) * kept;
    Vec updated = decayed - step_size * (m / (sqrt(v) / second_root + form.eps));
    if (words != nullptr) {
      UVec random;
      std::memcpy(&random, words + offset, sizeof(random));
      updated = stochastically_rounded(updated, random);
    }
    store(exp_avg + i, m, count);
    store(exp_avg_sq + i, v, count);
    store(parameter + i, updated, count);
  });
}

template <typename T>
void adamw(T* parameter, float* exp_avg, float* exp_avg_sq, const float* grad, int64_t first, int64_t size,
           const AdamW& given) {
  const AdamW form = given;  // a copy: as far as the compiler knows, stores to the buffers might change the one given
  if (!form.stochastic) {
    return adamw_run(parameter, exp_avg, exp_avg_sq, grad, first, size, form, nullptr);
  }
  // Runs of elements that are neighbours in the global tensor, too. A counter has the words of four of them.
  constexpr int64_t kRun = 1024;
  uint32_t words[kRun + 5 * W] = {};  // before the run, words that are not used; behind it, the rest of a vector
  const Rounding& place = form.rounding;
  for (int64_t i = first, size_of_run; i < first + size; i += size_of_run) {
    const int64_t row = (place.first + i) / place.columns, column = (place.first + i) % place.columns;
    const int64_t element = place.offset + row * place.pitch + column, skipped = element % 4;
    const int64_t left_in_row = place.columns == place.pitch ? kRun : place.columns - column;
    size_of_run = std::min({first + size - i, left_in_row, kRun});
    for (int64_t word = 0; word < skipped + size_of_run; word += 4 * W) {
      random_words(static_cast<uint64_t>(place.key), form.step, static_cast<uint64_t>((element + word) / 4),
                   words + word);
    }
    adamw_run(parameter, exp_avg, exp_avg_sq, grad, i, size_of_run, form, words + skipped);
  }
}
