// SwiGLU's elementwise part (Shazeer 2020): y = silu(gate) * up, silu(g) = g * sigmoid(g), rounded once.

template <typename T, bool kStream>
void swiglu_row(const T* gate, const T* up, T* y, int64_t size) {
  for_each_vector(size, [&](int64_t i, auto count) {
    const Vec g = load(gate + i, count);
    put<kStream>(y + i, g / (1.0f + exp(-g)) * load(up + i, count), count);
  });
}

template <typename T>
void swiglu(const T* gate, const T* up, T* y, int64_t size, bool streaming) {
  if (streaming && can_stream(y, size)) {
    swiglu_row<T, true>(gate, up, y, size);
    return finish_streams();
  }
  swiglu_row<T, false>(gate, up, y, size);
}

// silu'(g) = sigmoid(g) * (1 + g * (1 - sigmoid(g))) = sigmoid(g) * (1 - silu(g)) + silu(g).
template <typename T, bool kStream>
void swiglu_row_backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t size) {
  for_each_vector(size, [&](int64_t i, auto count) {
    const Vec above = load(grad + i, count), g = load(gate + i, count);
    const Vec sigmoid = 1.0f / (1.0f + exp(-g));
    const Vec silu = g * sigmoid, slope = fma(sigmoid, 1.0f - silu, silu);
    put<kStream>(grad_up + i, above * silu, count);
    put<kStream>(grad_gate + i, above * load(up + i, count) * slope, count);
  });
}

template <typename T>
void swiglu_backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t size,
                     bool streaming) {
  if (streaming && can_stream(grad_gate, size) && can_stream(grad_up, size)) {
    swiglu_row_backward<T, true>(grad, gate, up, grad_gate, grad_up, size);
    return finish_streams();
  }
  swiglu_row_backward<T, false>(grad, gate, up, grad_gate, grad_up, size);
}
