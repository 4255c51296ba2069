// Every kernel and launcher of this folder, to be called with pointers to ordinary memory:
//   g++ -std=c++17 -O1 -shared -fPIC -DMEGAGAP_SHIM -DMEGAGAP_WAVE=32 -Icsrc csrc/gpu/cpu_shim.cpp
#include "gpu/adamw.cu"
#include "gpu/cross_entropy.cu"
#include "gpu/rms_norm.cu"
#include "gpu/rotary.cu"
#include "gpu/swiglu.cu"

// Threads of a block run from the last to the first: what a kernel computes may not depend on it.
extern "C" void megagap_shim_reverse(int reversed) { megagap::shim::block().reversed = reversed != 0; }
