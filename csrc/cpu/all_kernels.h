// All kernels, in the namespace and with the vector width that the including isa_*.cpp has defined.

namespace megagap {
namespace MEGAGAP_ISA {
namespace {

#include "cpu/vector.h"

#include "cpu/adamw.h"
#include "cpu/cross_entropy.h"
#include "cpu/rms_norm.h"
#include "cpu/rotary.h"
#include "cpu/swiglu.h"

}  // namespace

template <typename T>
const Kernels<T>& kernels() {
  static constexpr Kernels<T> all = {
      rms_norm<T>,      rms_norm_backward<T>, rotary<T>,
      swiglu<T>,        swiglu_backward<T>,   cross_entropy<T>,
      cross_entropy_gradient<T>,
      adamw<T, float, float>, adamw<T, float, BFloat16>, adamw<T, BFloat16, float>, adamw<T, BFloat16, BFloat16>,
  };
  return all;
}

template const Kernels<float>& kernels<float>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Half>& kernels<Half>();

}  // namespace MEGAGAP_ISA
}  // namespace megagap
