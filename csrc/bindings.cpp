// Registers the compiled operations with torch.library, so that autograd and torch.compile see them.
// megagap/ops/ adds the backward formulas and the shapes.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/kernels.h"

namespace megagap {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread of their own
constexpr int64_t kRowBlocks = 64;  // sums over rows are made in at most this many parts, whatever the threads

template <typename T>
T* data(const at::Tensor& tensor) {
  return reinterpret_cast<T*>(tensor.data_ptr());
}

// Calls body with a value of the type that x's elements have in the kernels.
template <typename Body>
void for_dtype(const at::Tensor& x, const Body& body) {
  if (x.scalar_type() == at::kFloat) {
    body(float{});
  } else {
    TORCH_CHECK_NOT_IMPLEMENTED(x.scalar_type() == at::kBFloat16, "megagap kernels compute in float32 or bfloat16, not ",
                                x.scalar_type());
    body(BFloat16{});
  }
}

void check_rms_norm(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0), "rms_norm: x ", x.sizes(),
                    " and weight ", weight.sizes(), " do not fit");
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), "rms_norm: x is ", x.scalar_type(), ", weight is ",
                   weight.scalar_type());
}

int64_t rows_of(const at::Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x_given, const at::Tensor& weight_given, double eps) {
  check_rms_norm(x_given, weight_given);
  const at::Tensor x = x_given.contiguous(), weight = weight_given.contiguous();
  const int64_t size = x.size(-1), rows = rows_of(x);
  at::Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
  at::Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)), [&](int64_t begin, int64_t end) {
      rms_norm_rows(data<T>(x), data<T>(weight), data<T>(y), data<float>(rstd), begin, end, size,
                    static_cast<float>(eps));
    });
  });
  return {y, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad_given, const at::Tensor& x_given,
                                                     const at::Tensor& weight_given, const at::Tensor& rstd_given) {
  check_rms_norm(x_given, weight_given);
  TORCH_CHECK_VALUE(grad_given.sizes() == x_given.sizes() && grad_given.scalar_type() == x_given.scalar_type(),
                    "rms_norm: the gradient is not like x");
  const at::Tensor grad = grad_given.contiguous(), x = x_given.contiguous(), weight = weight_given.contiguous(),
                   rstd = rstd_given.contiguous();
  const int64_t size = x.size(-1), rows = rows_of(x);
  // The blocks depend on the shape alone, so the sum has the same order of additions on any number of threads.
  const int64_t block = std::max<int64_t>(1, (rows + kRowBlocks - 1) / kRowBlocks), blocks = (rows + block - 1) / block;
  TORCH_CHECK_VALUE(rstd.numel() == (size ? rows : rstd.numel()) && rstd.scalar_type() == at::kFloat,
                    "rms_norm: rstd does not belong to x");
  at::Tensor grad_x = at::empty_like(x, at::MemoryFormat::Contiguous);
  at::Tensor partial = at::empty({blocks, size}, x.options().dtype(at::kFloat));
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, block * size));
    at::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        rms_norm_rows_backward(data<T>(grad), data<T>(x), data<T>(weight), data<float>(rstd), data<T>(grad_x),
                               data<float>(partial) + part * size, part * block, std::min(rows, (part + 1) * block),
                               size);
      }
    });
  });
  at::Tensor grad_weight = at::empty_like(weight);
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, size, kGrain / kRowBlocks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float sum = 0;
        for (int64_t part = 0; part < blocks; ++part) {
          sum += data<float>(partial)[part * size + i];
        }
        data<T>(grad_weight)[i] = from_float<T>(sum);
      }
    });
  });
  return {grad_x, grad_weight};
}

// x [b, s, heads, d] rotated; cos, sin [s, d] or [b, s, d].
at::Tensor rotate(const at::Tensor& x_given, const at::Tensor& cos, const at::Tensor& sin, bool backward) {
  TORCH_CHECK_VALUE(x_given.dim() == 4 && x_given.size(3) % 2 == 0 && cos.sizes() == sin.sizes() &&
                        (cos.sizes() == at::IntArrayRef({x_given.size(1), x_given.size(3)}) ||
                         cos.sizes() == at::IntArrayRef({x_given.size(0), x_given.size(1), x_given.size(3)})),
                    "rotary: x ", x_given.sizes(), " and tables ", cos.sizes(), ", ", sin.sizes(), " do not fit");
  const at::Tensor x = x_given.contiguous();
  const int64_t heads = x.size(2), size = x.size(3), tokens = x.size(0) * x.size(1);
  at::Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, heads * size));
    at::parallel_for(0, y.numel() ? tokens : 0, grain, [&](int64_t begin, int64_t end) {
      rotary_rows(data<T>(x), data<float>(cos), data<float>(sin), data<T>(y), begin, end, heads, size / 2,
                  cos.numel() / size, backward);
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> rotary(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos_given,
                                          const at::Tensor& sin_given, bool backward) {
  TORCH_CHECK_TYPE(cos_given.scalar_type() == at::kFloat && sin_given.scalar_type() == at::kFloat,
                   "rotary: the tables must be float32");
  const at::Tensor cos = cos_given.contiguous(), sin = sin_given.contiguous();
  return {rotate(q, cos, sin, backward), rotate(k, cos, sin, backward)};
}

}  // namespace
}  // namespace megagap

TORCH_LIBRARY(megagap, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
  m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool backward) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megagap, CPU, m) {
  m.impl("rms_norm", &megagap::rms_norm);
  m.impl("rms_norm_backward", &megagap::rms_norm_backward);
  m.impl("rotary", &megagap::rotary);
}

// An empty Python module: importing it loads the library and with it the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
