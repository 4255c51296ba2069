// Shared by the launchers: from a type's code to its kernels, and whether these may read 16 bytes at once.
#pragma once

#include "gpu/elements.h"
#include "gpu/kernels.h"

namespace megagap::gpu {

constexpr int64_t kMaxRow = int64_t{1} << 30;  // columns are counted in int

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether kCount elements at once can be read of rows that begin `stride` elements apart.
template <int kCount, typename T>
bool aligned_for(const T* address, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(address) % (kCount * sizeof(T)) == 0 && stride % kCount == 0;
}

template <typename T>
bool aligned(const T* address, int64_t stride = 0) {
  return aligned_for<kVector<T>>(address, stride);
}

// body(T{}) for the element type T of the code.
template <typename Body>
auto for_type(int type, const Body& body) -> decltype(body(float{})) {
  switch (type) {
    case kMegagapFloat:
      return body(float{});
    case kMegagapBFloat16:
      return body(BFloat16{});
    case kMegagapHalf:
      return body(Half{});
    default:
      return kMegagapUnsupported;
  }
}

}  // namespace megagap::gpu
