// Every kernel and launcher of this folder, to be called with pointers to host memory. The tests compile it.
#include "gpu/adamw.cu"
#include "gpu/cross_entropy.cu"
#include "gpu/rms_norm.cu"
#include "gpu/rotary.cu"
#include "gpu/swiglu.cu"

// Threads of a block run from the last to the first: what a kernel computes may not depend on it.
extern "C" void megagap_shim_reverse(int reversed) { megagap::gpu::shim::block().reversed = reversed != 0; }
