// Rotary position embeddings (Su et al. 2021): pairs of each head are rotated by the angles of the token's position. The
// pairs are (x[i], x[i + half]) or, interleaved, (x[2i], x[2i + 1]); the tables hold the angle of an element where the
// element is. Backward multiplies by the transposed matrices.

template <typename T, bool kStream>
void rotary_halves(const T* x, T* y, const float* cos, const float* sin, const RotaryRows& given) {
  const RotaryRows form = given;
  const int64_t half = form.half;
  const float* into_first = form.backward ? sin + half : sin;  // what the other half is multiplied with
  const float* into_second = form.backward ? sin : sin + half;
  const float sign = form.backward ? -1.0f : 1.0f;
  for (int64_t head = 0; head < form.heads; ++head) {
    const T* from = x + head * form.head_stride_in;
    T* to = y + head * form.head_stride_out;
    for_each_vector(half, [&](int64_t i, auto count) {
      const Vec first = load(from + i, count), second = load(from + half + i, count);
      const Vec turned_first = second * (sign * load(into_first + i, count));
      const Vec turned_second = first * (sign * load(into_second + i, count));
      put<kStream>(to + i, first * load(cos + i, count) - turned_first, count);
      put<kStream>(to + half + i, second * load(cos + half + i, count) + turned_second, count);
    });
  }
}

template <typename T>
void rotary_interleaved(const T* x, T* y, const float* cos, const float* sin, const RotaryRows& form) {
  for (int64_t head = 0; head < form.heads; ++head) {
    const T* from = x + head * form.head_stride_in;
    T* to = y + head * form.head_stride_out;
    for (int64_t i = 0; i < 2 * form.half; i += 2) {
      const float first = to_float(from[i]), second = to_float(from[i + 1]);
      const float into_first = form.backward ? sin[i + 1] : -sin[i];
      const float into_second = form.backward ? -sin[i] : sin[i + 1];
      to[i] = from_float<T>(first * cos[i] + second * into_first);
      to[i + 1] = from_float<T>(second * cos[i + 1] + first * into_second);
    }
  }
}

template <typename T>
void rotary(const T* x, T* y, const float* cos, const float* sin, const RotaryRows& form) {
  if (form.interleaved) {
    return rotary_interleaved(x, y, cos, sin, form);
  }
  if (form.streaming && x != y && can_stream(y, form.head_stride_out) && form.half % W == 0) {
    rotary_halves<T, true>(x, y, cos, sin, form);
    return finish_streams();
  }
  rotary_halves<T, false>(x, y, cos, sin, form);
}
