// Sums and maxima over threads, in an order that depends on the number of threads alone.
#pragma once

#include "gpu/gpu_compat.h"

namespace megagap::gpu {

constexpr int kMaxWaves = 32;  // in a block of 1,024 threads with the smaller wave

struct Sum {
  static MEGAGAP_DEVICE float apply(float a, float b) { return a + b; }
};
struct Maximum {
  static MEGAGAP_DEVICE float apply(float a, float b) { return a > b ? a : b; }
};

// Every group of `lanes` neighbouring threads, a power of two, gets its own result. All threads of the block call it,
// and blocks are made of whole waves. `shared` has kMaxWaves floats, not used since the last barrier but one: callers
// alternate between two.
template <typename Operation>
MEGAGAP_DEVICE float reduce_group(float value, int lanes, float* shared) {
  const int wave = wave_size(), thread = static_cast<int>(threadIdx.x);
  for (int offset = (lanes < wave ? lanes : wave) / 2; offset > 0; offset /= 2) {
    value = Operation::apply(value, shuffle_xor(value, offset));
  }
  if (lanes > wave) {
    if (thread % wave == 0) shared[thread / wave] = value;
    block_barrier();
    const int waves = lanes / wave, first = thread / lanes * waves;
    value = shared[first];
    for (int i = 1; i < waves; ++i) value = Operation::apply(value, shared[first + i]);
  }
  return value;
}

}  // namespace megagap::gpu
