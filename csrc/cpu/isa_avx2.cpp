// The kernels for AVX2.
#include "cpu/headers.h"

#if defined(__x86_64__)
#define MEGAGAP_WIDTH 8
#define MEGAGAP_AVX2  // the compiler's macros do not follow its pragmas
#define MEGAGAP_ISA isa_avx2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "cpu/all_kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
