// SwiGLU's elementwise part (Shazeer 2020): y = silu(gate) * up, silu(g) = g * sigmoid(g), rounded once.

template <typename T>
void swiglu(const T* gate, const T* up, T* y, int64_t size) {
  for_each_vector(size, [&](int64_t i, auto count) {
    const Vec g = load(gate + i, count);
    store(y + i, g / (1.0f + exp(-g)) * load(up + i, count), count);
  });
}

// silu'(g) = sigmoid(g) * (1 + g * (1 - sigmoid(g))).
template <typename T>
void swiglu_backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t size) {
  for_each_vector(size, [&](int64_t i, auto count) {
    const Vec above = load(grad + i, count), g = load(gate + i, count);
    const Vec sigmoid = 1.0f / (1.0f + exp(-g));
    store(grad_up + i, above * (g * sigmoid), count);
    store(grad_gate + i, above * load(up + i, count) * (sigmoid * (1.0f + g * (1.0f - sigmoid))), count);
  });
}
