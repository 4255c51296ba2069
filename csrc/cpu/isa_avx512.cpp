// The kernels for AVX-512, with the extensions that torch requires: F, BW, DQ and VL.
#include "cpu/headers.h"

#if defined(__x86_64__)
#define MEGAGAP_WIDTH 16
#define MEGAGAP_AVX512  // the compiler's macros do not follow its pragmas
#define MEGAGAP_ISA isa_avx512
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#include "cpu/all_kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
