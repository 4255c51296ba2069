// The operations on CPU tensors: checks, memory and threads around the kernels.
#include "cpu/ops.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace megagap {

template <typename T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  static const Kernels<T>& chosen = [&]() -> const Kernels<T>& {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? isa_avx512::kernels<T>()
           : capability == "AVX2" ? isa_avx2::kernels<T>()
                                  : isa_default::kernels<T>();
  }();
  return chosen;
#else
  return isa_default::kernels<T>();
#endif
}

namespace cpu {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 16384;             // minimum elements per thread
constexpr int64_t kStreamedBytes = 16 << 20;  // minimum size of a result that is not expected to stay in the caches
constexpr int64_t kRowBlocks = 64;            // at most this many parts of a sum over rows, whatever the number of threads

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.defined() ? reinterpret_cast<T*>(tensor.data_ptr()) : nullptr;
}

// Calls body with a value of the type that x's elements have in the kernels.
template <typename Body>
void for_dtype(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return body(float{});
    case at::kBFloat16:
      return body(BFloat16{});
    case at::kHalf:
      return body(Half{});
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "megagap's kernels compute in float32, bfloat16 or float16, not ",
                                  x.scalar_type());
  }
}

int64_t grain(int64_t elements_each) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_each)); }

// x [..., size] as rows at a constant stride: x itself if it is laid out so, else a copy.
struct Rows {
  explicit Rows(const Tensor& given) {
    size = given.size(-1);
    count = size ? given.numel() / size : 0;
    tensor = regular(given) ? given : given.contiguous();
    stride = size;
    for (int64_t dim = tensor.dim() - 2; dim >= 0; --dim) {
      if (tensor.size(dim) > 1) {
        stride = tensor.stride(dim);
        break;
      }
    }
  }

  Tensor tensor;
  int64_t count, size, stride;

 private:
  static bool regular(const Tensor& x) {
    if (x.size(-1) > 1 && x.stride(-1) != 1) {
      return false;
    }
    int64_t expected = -1;
    for (int64_t dim = x.dim() - 2; dim >= 0; --dim) {
      if (x.size(dim) == 1) {
        continue;
      }
      if (expected >= 0 && x.stride(dim) != expected) {
        return false;
      }
      expected = x.stride(dim) * x.size(dim);
    }
    return true;
  }
};

bool streaming(const Tensor& result) { return static_cast<int64_t>(result.nbytes()) >= kStreamedBytes; }

Tensor new_like(const Tensor& x) { return at::empty_like(x, at::MemoryFormat::Contiguous); }

void check_rms_norm(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0), "rms_norm: x ", x.sizes(),
                    " and weight ", weight.sizes(), " do not fit");
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), "rms_norm: x is ", x.scalar_type(), ", weight is ",
                   weight.scalar_type());
}

void check_alike(const char* op, const Tensor& a, const Tensor& b) {
  TORCH_CHECK_VALUE(a.sizes() == b.sizes(), op, ": ", a.sizes(), " and ", b.sizes(), " should be alike");
  TORCH_CHECK_TYPE(a.scalar_type() == b.scalar_type(), op, ": ", a.scalar_type(), " and ", b.scalar_type(),
                   " should be alike");
}

// y, the sum (undefined without residual) and rstd.
std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& x, const Tensor& residual_given, const Tensor& weight_given,
                                        double eps, double gain_scale) {
  check_rms_norm(x, weight_given);
  const Rows rows(x);
  const Tensor weight = weight_given.contiguous();
  Tensor residual, total;
  if (residual_given.defined()) {
    check_alike("add_rms_norm", x, residual_given);
    residual = residual_given.contiguous();
    total = new_like(x);
  }
  Tensor y = new_like(x), rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, rows.count, grain(rows.size), [&](int64_t begin, int64_t end) {
      const auto at_row = [&](const Tensor& t) { return t.defined() ? data<T>(t) + begin * rows.size : nullptr; };
      kernels<T>().rms_norm(data<T>(rows.tensor) + begin * rows.stride, rows.stride, at_row(residual), data<T>(weight),
                            at_row(y), at_row(total), data<float>(rstd) + begin, end - begin, rows.size,
                            static_cast<float>(eps), static_cast<float>(gain_scale), streaming(y));
    });
  });
  return {y, total, rstd};
}

std::tuple<Tensor, Tensor> norm_backward(const Tensor& grad_given, const Tensor& grad_total_given, const Tensor& x,
                                         const Tensor& weight_given, const Tensor& rstd_given, double gain_scale) {
  check_rms_norm(x, weight_given);
  check_alike("rms_norm_backward", grad_given, x);
  const Rows rows(x);
  const Tensor grad = grad_given.contiguous(), weight = weight_given.contiguous(), rstd = rstd_given.contiguous();
  Tensor grad_total;
  if (grad_total_given.defined()) {
    check_alike("add_rms_norm_backward", grad_total_given, x);
    grad_total = grad_total_given.contiguous();
  }
  TORCH_CHECK_VALUE(rstd.scalar_type() == at::kFloat && rstd.sizes() == x.sizes().slice(0, x.dim() - 1),
                    "rms_norm: rstd does not belong to x");
  // The blocks depend on the shape alone, so the order of additions is the same on any number of threads.
  const int64_t block = std::max<int64_t>(1, (rows.count + kRowBlocks - 1) / kRowBlocks);
  const int64_t blocks = (rows.count + block - 1) / block;
  Tensor grad_x = new_like(x), grad_weight = at::empty_like(weight);
  Tensor partial = at::zeros({blocks, rows.size}, x.options().dtype(at::kFloat));
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, blocks, grain(block * rows.size), [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = part * block, count = std::min(rows.count - begin, block);
        const auto at_row = [&](const Tensor& t) { return t.defined() ? data<T>(t) + begin * rows.size : nullptr; };
        kernels<T>().rms_norm_backward(at_row(grad), at_row(grad_total), data<T>(rows.tensor) + begin * rows.stride,
                                       rows.stride, data<T>(weight), data<float>(rstd) + begin, at_row(grad_x),
                                       data<float>(partial) + part * rows.size, count, rows.size,
                                       static_cast<float>(gain_scale), streaming(grad_x));
      }
    });
    std::vector<float> sums(rows.size, 0.0f);
    for (int64_t part = 0; part < blocks; ++part) {
      const float* own = data<float>(partial) + part * rows.size;
      for (int64_t i = 0; i < rows.size; ++i) {
        sums[i] += own[i];
      }
    }
    for (int64_t i = 0; i < rows.size; ++i) {
      data<T>(grad_weight)[i] = from_float<T>(sums[i] * static_cast<float>(gain_scale));
    }
  });
  return {grad_x, grad_weight};
}

// The tables of cosines and sines, and which of their rows a token uses.
struct Tables {
  Tables(const Tensor& x, const Tensor& cos_given, const Tensor& sin_given, const std::optional<Tensor>& positions_given) {
    TORCH_CHECK_TYPE(cos_given.scalar_type() == at::kFloat && sin_given.scalar_type() == at::kFloat,
                     "rotary: the tables must be float32");
    TORCH_CHECK_VALUE(x.dim() == 4 && x.size(3) % 2 == 0 && cos_given.sizes() == sin_given.sizes(), "rotary: x ",
                      x.sizes(), " and tables ", cos_given.sizes(), ", ", sin_given.sizes(), " do not fit");
    cos = cos_given.contiguous();
    sin = sin_given.contiguous();
    size = x.size(3);
    const at::IntArrayRef found = cos.sizes();
    if (positions_given) {
      TORCH_CHECK_VALUE(found.size() == 2 && found[1] == size && positions_given->sizes() == x.sizes().slice(0, 2),
                        "rotary: x ", x.sizes(), ", tables ", found, " and positions ", positions_given->sizes(),
                        " do not fit");
      positions = positions_given->to(at::kLong).contiguous();
      if (positions.numel()) {
        const int64_t lowest = positions.min().item<int64_t>(), highest = positions.max().item<int64_t>();
        TORCH_CHECK_INDEX(lowest >= 0 && highest < found[0], "rotary: positions from ", lowest, " to ", highest,
                          " in tables of ", found[0]);
      }
    } else {
      TORCH_CHECK_VALUE(found == at::IntArrayRef({x.size(1), size}) || found == x.sizes().slice(0, 2).vec() ||
                            found == at::IntArrayRef({x.size(0), x.size(1), size}),
                        "rotary: x ", x.sizes(), " and tables ", found, " do not fit");
      rows = std::max<int64_t>(1, cos.numel() / std::max<int64_t>(1, size));
    }
  }

  int64_t row(int64_t token) const {
    return (positions.defined() ? positions.data_ptr<int64_t>()[token] : token % rows) * size;
  }

  Tensor cos, sin, positions;
  int64_t size, rows = 1;
};

// The first heads of x rotated into y, which may be x.
void rotate(const Tensor& x, const Tensor& y, int64_t heads, const Tables& tables, bool interleaved, bool backward) {
  const int64_t length = x.size(1), tokens = x.size(0) * length;
  const RotaryRows form{heads, x.size(3) / 2, x.stride(2), y.stride(2), interleaved, backward, streaming(y)};
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, heads && x.size(3) ? tokens : 0, grain(heads * x.size(3)), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t sequence = token / length, place = token % length, row = tables.row(token);
        kernels<T>().rotary(data<T>(x) + sequence * x.stride(0) + place * x.stride(1),
                            data<T>(y) + sequence * y.stride(0) + place * y.stride(1), data<float>(tables.cos) + row,
                            data<float>(tables.sin) + row, form);
      }
    });
  });
}

Tensor with_unit_stride(const Tensor& x) { return x.size(3) > 1 && x.stride(3) != 1 ? x.contiguous() : x; }

Tensor rotated(const Tensor& given, const Tables& tables, bool interleaved, bool backward) {
  const Tensor x = with_unit_stride(given);
  Tensor y = new_like(x);
  rotate(x, y, x.size(2), tables, interleaved, backward);
  return y;
}

// body(row): a row's work, over rows of size elements each.
template <typename Body>
void for_rows(int64_t rows, int64_t size, const Body& body) {
  at::parallel_for(0, rows, grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      body(row);
    }
  });
}

// Logits [n, v] as rows: the columns from `first` on of a vocabulary, in which targets are ids; one below 0 is ignored.
struct Logits {
  Logits(const char* op, const Tensor& logits, const Tensor& targets_given, int64_t first)
      : tensor(logits), targets(targets_given.contiguous()), first(first) {
    TORCH_CHECK_VALUE(logits.dim() == 2 && (logits.size(1) < 2 || logits.stride(1) == 1) && targets.dim() == 1 &&
                          targets.size(0) == logits.size(0),
                      op, ": logits ", logits.sizes(), " and targets ", targets.sizes(), " do not fit");
    TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong, op, ": targets are ", targets.scalar_type(), ", not int64");
  }

  void check_float(const char* op, const Tensor& x, int64_t size, const char* name) const {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.numel() == size, op, ": ", name, " must be float32, ", size,
                      " elements");
  }

  Tensor new_statistics() const { return at::empty({3, rows()}, tensor.options().dtype(at::kFloat)); }

  int64_t rows() const { return tensor.size(0); }
  int64_t size() const { return tensor.size(1); }
  int64_t target(int64_t row) const { return targets.data_ptr<int64_t>()[row]; }

  // Of its target, or -1.
  int64_t column(int64_t row) const {
    const int64_t column = target(row) - first;
    return column >= 0 && column < size() ? column : -1;
  }

  template <typename T>
  T* row(int64_t row) const {
    return data<T>(tensor) + row * tensor.stride(0);
  }

  template <typename T>
  void find_statistics(int64_t row, const Tensor& statistics) const {
    float* out = data<float>(statistics) + row;
    kernels<T>().cross_entropy(this->row<T>(row), column(row), size(), out, out + rows(), out + 2 * rows());
  }

  template <typename T>
  void replace_by_gradient(int64_t row, const Tensor& statistics, float scale, float z_loss) const {
    const float* in = data<float>(statistics) + row;
    const float log_sum_exp = in[0] + std::log(in[rows()]);
    kernels<T>().cross_entropy_gradient(this->row<T>(row), column(row), size(), log_sum_exp,
                                        1.0f + 2.0f * z_loss * log_sum_exp, target(row) < 0 ? 0.0f : scale);
  }

  Tensor tensor, targets;
  int64_t first;
};

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double gain_scale) {
  auto [y, total, rstd] = norm(x, Tensor(), weight, eps, gain_scale);
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, double gain_scale) {
  return norm_backward(grad, Tensor(), x, weight, rstd, gain_scale);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps, double gain_scale) {
  return norm(x, residual, weight, eps, gain_scale);
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& grad, const Tensor& grad_total, const Tensor& total,
                                                 const Tensor& weight, const Tensor& rstd, double gain_scale) {
  return norm_backward(grad, grad_total, total, weight, rstd, gain_scale);
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  const std::optional<Tensor>& positions, bool interleaved, bool backward) {
  const Tables for_q(q, cos, sin, positions);
  TORCH_CHECK_VALUE(k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3),
                    "rotary: q ", q.sizes(), " and k ", k.sizes(), " do not fit");
  return {rotated(q, for_q, interleaved, backward), rotated(k, for_q, interleaved, backward)};
}

void rotary_(const Tensor& packed, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
             int64_t heads, bool interleaved, bool backward) {
  const Tables tables(packed, cos, sin, positions);
  TORCH_CHECK_VALUE(0 <= heads && heads <= packed.size(2), "rotary_: ", heads, " of ", packed.size(2), " heads");
  TORCH_CHECK_VALUE(packed.size(3) < 2 || packed.stride(3) == 1, "rotary_: the heads must be contiguous");
  rotate(packed, packed, heads, tables, interleaved, backward);
}

Tensor rotary_pack(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                   const std::optional<Tensor>& positions, bool interleaved, bool backward) {
  const Tables tables(q, cos, sin, positions);
  for (const Tensor& x : {k, v}) {
    TORCH_CHECK_VALUE(x.dim() == 4 && x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(3) == q.size(3),
                      "rotary_pack: q ", q.sizes(), " and k or v ", x.sizes(), " do not fit");
    TORCH_CHECK_TYPE(x.scalar_type() == q.scalar_type(), "rotary_pack: q is ", q.scalar_type(), ", k or v is ",
                     x.scalar_type());
  }
  Tensor packed = at::empty({q.size(0), q.size(1), q.size(2) + k.size(2) + v.size(2), q.size(3)}, q.options());
  int64_t first = 0;
  for (const Tensor& given : {q, k}) {
    const Tensor x = with_unit_stride(given);
    rotate(x, packed.narrow(2, first, x.size(2)), x.size(2), tables, interleaved, backward);
    first += x.size(2);
  }
  packed.narrow(2, first, v.size(2)).copy_(v);
  return packed;
}

Tensor swiglu(const Tensor& gate_given, const Tensor& up_given) {
  check_alike("swiglu", gate_given, up_given);
  const Rows gate(gate_given), up(up_given);
  Tensor y = new_like(gate_given);
  for_dtype(y, [&](auto element) {
    using T = decltype(element);
    for_rows(gate.count, gate.size, [&](int64_t row) {
      kernels<T>().swiglu(data<T>(gate.tensor) + row * gate.stride, data<T>(up.tensor) + row * up.stride,
                          data<T>(y) + row * gate.size, gate.size, streaming(y));
    });
  });
  return y;
}

Tensor swiglu_backward(const Tensor& grad_given, const Tensor& gate_given, const Tensor& up_given) {
  check_alike("swiglu", gate_given, up_given);
  check_alike("swiglu_backward", grad_given, gate_given);
  const Rows gate(gate_given), up(up_given), grad(grad_given);
  std::vector<int64_t> shape = gate_given.sizes().vec();
  shape.back() *= 2;
  const Tensor grads = at::empty(shape, gate_given.options());
  for_dtype(grads, [&](auto element) {
    using T = decltype(element);
    for_rows(gate.count, gate.size, [&](int64_t row) {
      T* to_row = data<T>(grads) + 2 * row * gate.size;
      kernels<T>().swiglu_backward(data<T>(grad.tensor) + row * grad.stride, data<T>(gate.tensor) + row * gate.stride,
                                   data<T>(up.tensor) + row * up.stride, to_row, to_row + gate.size, gate.size,
                                   streaming(grads));
    });
  });
  return grads;
}

Tensor cross_entropy_rows(const Tensor& logits, const Tensor& targets, int64_t first) {
  const Logits all("cross_entropy_rows", logits, targets, first);
  const Tensor statistics = all.new_statistics();
  for_dtype(logits, [&](auto element) {
    using T = decltype(element);
    for_rows(all.rows(), all.size(), [&](int64_t row) { all.find_statistics<T>(row, statistics); });
  });
  return statistics;
}

void cross_entropy_rows_gradient_(const Tensor& logits, const Tensor& targets, int64_t first,
                                  const Tensor& statistics_given, const Tensor& scale, double z_loss) {
  const char* op = "cross_entropy_rows_gradient_";
  const Logits all(op, logits, targets, first);
  const Tensor statistics = statistics_given.contiguous();
  all.check_float(op, statistics, 3 * all.rows(), "statistics");
  all.check_float(op, scale, 1, "scale");
  for_dtype(logits, [&](auto element) {
    using T = decltype(element);
    for_rows(all.rows(), all.size(), [&](int64_t row) {
      all.replace_by_gradient<T>(row, statistics, *data<float>(scale), static_cast<float>(z_loss));
    });
  });
}

Tensor cross_entropy_(const Tensor& logits, const Tensor& targets, const Tensor& scale, double z_loss) {
  const char* op = "cross_entropy_";
  const Logits all(op, logits, targets, 0);
  all.check_float(op, scale, 1, "scale");
  const int64_t highest = targets.numel() ? targets.max().item<int64_t>() : -1;
  TORCH_CHECK_INDEX(highest < all.size(), op, ": target ", highest, " in ", all.size(), " columns");
  const Tensor statistics = all.new_statistics();
  for_dtype(logits, [&](auto element) {
    using T = decltype(element);
    // A row is still in the core's cache when it is read again.
    for_rows(all.rows(), all.size(), [&](int64_t row) {
      all.find_statistics<T>(row, statistics);
      all.replace_by_gradient<T>(row, statistics, *data<float>(scale), static_cast<float>(z_loss));
    });
  });
  return statistics;
}

void adamw_(const Tensor& parameter, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grad_given,
            const Tensor& grad_scale, const Tensor& found_inf, const Tensor& step, double lr, double beta1,
            double beta2, double eps, double weight_decay, at::OptionalIntArrayRef rounding,
            const std::optional<Tensor>& remainder) {
  for (const Tensor& state : {exp_avg, exp_avg_sq, grad_given, parameter, remainder.value_or(parameter)}) {
    TORCH_CHECK_VALUE(state.is_contiguous() && state.numel() == parameter.numel(),
                      "adamw_: parameter, moments and gradient must be contiguous and of one size");
  }
  const bool wide_moments = exp_avg.scalar_type() == at::kFloat;
  TORCH_CHECK_TYPE(exp_avg.scalar_type() == exp_avg_sq.scalar_type() &&
                       (wide_moments || exp_avg.scalar_type() == at::kBFloat16),
                   "adamw_: the moments must both be float32, or bfloat16");
  TORCH_CHECK_TYPE(parameter.scalar_type() != at::kHalf, "adamw_: parameters are float32 or bfloat16");
  TORCH_CHECK_TYPE(!remainder || (parameter.scalar_type() == at::kBFloat16 && remainder->scalar_type() == at::kShort),
                   "adamw_: a remainder is in int16, of a parameter in bfloat16");
  const bool rounded = !wide_moments || (parameter.scalar_type() == at::kBFloat16 && !remainder);
  TORCH_CHECK_VALUE(!rounding || (rounding->size() == 5 && rounded),
                    "adamw_: the place of an element has five numbers, to round bfloat16 without a remainder");
  if (found_inf.item<float>() != 0) {
    return;
  }
  const bool wide_grad = grad_given.scalar_type() != at::kBFloat16;
  const Tensor grad = wide_grad ? grad_given.to(at::kFloat) : grad_given;
  const double updates = step.item<double>();
  const AdamW form{static_cast<float>(beta2),
                   static_cast<float>(1 - beta1),
                   static_cast<float>(1 - beta2),
                   static_cast<float>(1 - lr * weight_decay),
                   static_cast<float>(lr / (1 - std::pow(beta1, updates))),
                   static_cast<float>(std::sqrt(1 - std::pow(beta2, updates))),
                   static_cast<float>(eps),
                   grad_scale.item<float>(),
                   rounding.has_value(),
                   rounding ? Rounding{(*rounding)[0], (*rounding)[1], (*rounding)[2], (*rounding)[3], (*rounding)[4]}
                            : Rounding{},
                   static_cast<uint32_t>(updates)};
  for_dtype(parameter, [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, parameter.numel(), kGrain, [&](int64_t begin, int64_t end) {
      uint16_t* rest = remainder ? data<uint16_t>(*remainder) : nullptr;
      const auto update = [&](auto kernel, auto moment, auto gradient) {
        using M = decltype(moment);
        using G = decltype(gradient);
        kernel(data<T>(parameter), rest, data<M>(exp_avg), data<M>(exp_avg_sq), data<G>(grad), begin, end - begin, form);
      };
      const Kernels<T>& all = kernels<T>();
      if (wide_moments) {
        wide_grad ? update(all.adamw, float{}, float{}) : update(all.adamw_of_bfloat16, float{}, BFloat16{});
      } else {
        wide_grad ? update(all.adamw_in_bfloat16, BFloat16{}, float{})
                  : update(all.adamw_in_and_of_bfloat16, BFloat16{}, BFloat16{});
      }
    });
  });
}

}  // namespace cpu
}  // namespace megagap
