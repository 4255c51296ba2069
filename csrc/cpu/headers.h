// Headers that the kernels need, included before an isa_*.cpp changes the instruction set: otherwise the linker might
// keep an inline function of the standard library that was compiled for AVX-512, for all machines.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"
