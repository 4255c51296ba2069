// What differs between CUDA, HIP and the CPU shim. Everything else in this folder is the same source for all three.
#pragma once

#include <cstdint>

#if defined(MEGAGAP_SHIM)
#include "gpu/cpu_shim.h"
#elif defined(__HIPCC__)
#include <hip/hip_runtime.h>
#else
#include <cuda_runtime.h>
#endif

#define MEGAGAP_DEVICE __device__ __forceinline__

namespace megagap::gpu {

// Beyond this many blocks, the kernel loops. HIP allows less than 2^32 threads in a launch.
#if defined(MEGAGAP_SHIM)
constexpr int64_t kGridLimit = 5;  // so that tests of small inputs reach the loop
#else
constexpr int64_t kGridLimit = int64_t{1} << 20;
#endif

// Starts kernel<<<grid, block>>> on the stream; 0 or the runtime's error code.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t grid, dim3 block, void* stream, const Arguments&... arguments) {
  const dim3 blocks(static_cast<unsigned>(grid < kGridLimit ? grid : kGridLimit));
#if defined(MEGAGAP_SHIM)
  (void)stream;
  shim::run(blocks, block, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return 0;
#elif defined(__HIPCC__)
  kernel<<<blocks, block, 0, static_cast<hipStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  return static_cast<int>(hipGetLastError());
#else
  kernel<<<blocks, block, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  return static_cast<int>(cudaGetLastError());
#endif
}

// Multiprocessors (compute units) of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
#if defined(MEGAGAP_SHIM)
  (void)device;
  count = 2;
#elif defined(__HIPCC__)
  (void)hipGetDevice(&device);
  (void)hipDeviceGetAttribute(&count, hipDeviceAttributeMultiprocessorCount, device);
#else
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
#endif
  return count < 1 ? 1 : count;
}

inline const char* error_text(int code) {
#if defined(MEGAGAP_SHIM)
  (void)code;
  return "error in the CPU shim";
#elif defined(__HIPCC__)
  return hipGetErrorString(static_cast<hipError_t>(code));
#else
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}

// Threads that run in lockstep: 32, or 64 on AMD's CDNA. Only known when compiling kernels; host code never uses it.
MEGAGAP_DEVICE int wave_size() {
#if defined(MEGAGAP_SHIM)
  return MEGAGAP_WAVE;
#elif defined(__HIP_DEVICE_COMPILE__)
#if __has_builtin(__builtin_amdgcn_wavefrontsize)
  return static_cast<int>(__builtin_amdgcn_wavefrontsize());
#else
  return __AMDGCN_WAVEFRONT_SIZE;  // deprecated where the builtin is
#endif
#else
  return 32;  // also where hipcc compiles the kernels for the host, which never runs them
#endif
}

// Accurate to a few units in the last place, at a fraction of the instructions.
MEGAGAP_DEVICE float fast_exp(float x) {
#if defined(MEGAGAP_SHIM)
  return expf(x);
#else
  return __expf(x);
#endif
}

MEGAGAP_DEVICE float fast_divide(float a, float b) {
#if defined(MEGAGAP_SHIM)
  return a / b;
#else
  return __fdividef(a, b);
#endif
}

#if !defined(MEGAGAP_SHIM)  // the shim has its own versions of the following

// The value of the thread whose number in the wave differs by the bits of mask. All threads of the wave must call it.
MEGAGAP_DEVICE float shuffle_xor(float value, int mask) {
#if defined(__HIPCC__)
  return __shfl_xor(value, mask);
#else
  return __shfl_xor_sync(0xffffffffu, value, mask);
#endif
}

// All threads of the block must call it.
MEGAGAP_DEVICE void block_barrier() { __syncthreads(); }

#endif

}  // namespace megagap::gpu
