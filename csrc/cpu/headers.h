// What the kernels need of others, included before an isa_*.cpp changes the instruction set: an inline function of the
// standard library that was compiled for AVX-512 might be the one that the linker keeps for all.
#pragma once

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
