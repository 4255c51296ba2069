// The kernels for any processor: SSE2, or NEON.
#include "cpu/headers.h"

#if defined(__aarch64__)
#define MEGAGAP_WIDTH 4
#else
#define MEGAGAP_WIDTH 8
#endif
#define MEGAGAP_ISA isa_default
#include "cpu/all_kernels.h"
