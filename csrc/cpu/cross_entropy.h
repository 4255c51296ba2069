// Softmax statistics of a row of logits, of which a rank may hold only some columns, and the gradient in place of it:
// (exp(logit - log_sum_exp) * factor - [column == target]) * scale.

template <typename T>
void cross_entropy(const T* logits, int64_t target, int64_t size, float* maximum_out, float* sum_out,
                   float* at_target) {
  Vec highest = broadcast(-std::numeric_limits<float>::infinity());
  for_each_vector(size - size % W, [&](int64_t i, auto count) {
    highest = maximum(load(logits + i, count), highest);
  });
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t lane = 0; lane < W; ++lane) {
    top = highest[lane] > top ? highest[lane] : top;
  }
  for (int64_t i = size - size % W; i < size; ++i) {
    top = to_float(logits[i]) > top ? to_float(logits[i]) : top;
  }
  // Comparisons drop NaN, this sum keeps it.
  Vec sums[2] = {};
  int64_t turn = 0;
  for_each_vector(size - size % W, [&](int64_t i, auto count) {
    sums[turn ^= 1] += exp(load(logits + i, count) - top);
  });
  float sum = sum_of_lanes(sums[0] + sums[1]);
  if (const int rest = static_cast<int>(size % W)) {
    const Vec last = exp(load(logits + size - rest, rest) - top);
    for (int lane = 0; lane < rest; ++lane) {
      sum += last[lane];
    }
  }
  *maximum_out = top;
  *sum_out = sum;
  *at_target = target < 0 ? 0.0f : to_float(logits[target]);
}

template <typename T>
void cross_entropy_gradient(T* logits, int64_t target, int64_t size, float log_sum_exp, float factor,
                            float scale) {
  const float at_target = target < 0 ? 0.0f : to_float(logits[target]);
  const float of_softmax = factor * scale;
  for_each_vector(size, [&](int64_t i, auto count) {
    store(logits + i, exp(load(logits + i, count) - log_sum_exp) * of_softmax, count);
  });
  if (target >= 0) {
    logits[target] = from_float<T>((exp(broadcast(at_target - log_sum_exp))[0] * factor - 1.0f) * scale);
  }
}
