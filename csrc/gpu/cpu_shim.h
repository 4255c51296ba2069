// Runs the kernels of this folder on the CPU, so that their very text is tested where there is no GPU.
//
// Blocks run one after another; the threads of a block are fibres with stacks of their own. A fibre runs until it ends
// or waits: at a barrier for all threads of its block, at a shuffle for all threads of its wave. What a GPU leaves
// undefined ends the process with a message here: a barrier or shuffle that some threads do not reach, or reach at
// another place, and a shuffle from a thread that does not exist.
//
// One translation unit includes it, from g++ or clang: -x c++ -DMEGAGAP_SHIM -DMEGAGAP_WAVE=32 (or 64).
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#if MEGAGAP_WAVE != 32 && MEGAGAP_WAVE != 64
#error "MEGAGAP_WAVE must be 32 or 64"
#endif

#define __global__ static
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

// Of the fibre that runs.
static dim3 threadIdx, blockIdx, blockDim, gridDim;

static inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
static inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
static inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace megagap {
namespace shim {

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kMaxThreads = 1024;

enum class State { kRuns, kAtBarrier, kAtShuffle, kEnded };

struct Fibre {
  ucontext_t context;
  State state;
  dim3 index;
  int line;  // of the barrier or shuffle at which it waits
  float sent, received;
  int mask;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fibre> fibres = std::vector<Fibre>(kMaxThreads);
  std::vector<char> stacks = std::vector<char>(kMaxThreads * kStack);
  std::function<void()> kernel;
  unsigned threads = 0, current = 0;
  bool reversed = false;  // the order in which threads run: results must not depend on it
};

inline Block& block() {
  static Block instance;
  return instance;
}

[[noreturn]] inline void fail(const char* what, unsigned thread) {
  std::fprintf(stderr, "cpu_shim: %s (thread %u of %u, block %u)\n", what, thread, block().threads, blockIdx.x);
  std::abort();
}

inline void wait(State state, int line) {
  Block& all = block();
  Fibre& fibre = all.fibres[all.current];
  fibre.state = state;
  fibre.line = line;
  swapcontext(&fibre.context, &all.scheduler);
}

inline void enter() {
  Block& all = block();
  all.kernel();
  all.fibres[all.current].state = State::kEnded;
  swapcontext(&all.fibres[all.current].context, &all.scheduler);
}

// Whether threads [begin, end) all wait in this state; some that do and some that do not or wait elsewhere is a fault.
inline bool all_wait(State state, unsigned begin, unsigned end, const char* fault) {
  Block& all = block();
  unsigned waiting = 0;
  const Fibre* first = nullptr;
  for (unsigned i = begin; i < end; ++i) {
    if (all.fibres[i].state == state) {
      first = first ? first : &all.fibres[i];
      ++waiting;
      if (all.fibres[i].line != first->line) fail(fault, i);
    }
  }
  if (waiting != 0 && waiting != end - begin && state == State::kAtShuffle) fail(fault, begin);
  return waiting == end - begin;
}

// Every thread has run as far as it can: lets those go on that have waited for each other.
inline void release() {
  Block& all = block();
  bool shuffled = false;
  for (unsigned begin = 0; begin < all.threads; begin += MEGAGAP_WAVE) {
    const unsigned end = begin + MEGAGAP_WAVE < all.threads ? begin + MEGAGAP_WAVE : all.threads;
    if (!all_wait(State::kAtShuffle, begin, end, "a shuffle that not all threads of a wave reach")) continue;
    for (unsigned i = begin; i < end; ++i) {
      const unsigned source = i ^ static_cast<unsigned>(all.fibres[i].mask);
      if (source < begin || source >= end) fail("a shuffle from a thread that does not exist", i);
      all.fibres[i].received = all.fibres[source].sent;
      all.fibres[i].state = State::kRuns;
    }
    shuffled = true;
  }
  if (shuffled) return;
  if (!all_wait(State::kAtBarrier, 0, all.threads, "threads of a block wait at different barriers")) {
    fail("a barrier that not all threads of the block reach", 0);
  }
  for (unsigned i = 0; i < all.threads; ++i) all.fibres[i].state = State::kRuns;
}

inline void run_block() {
  Block& all = block();
  for (unsigned i = 0; i < all.threads; ++i) {
    Fibre& fibre = all.fibres[i];
    fibre.state = State::kRuns;
    fibre.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = &all.stacks[i * kStack];
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
  }
  for (unsigned ended = 0; ended < all.threads;) {
    bool ran = false;
    for (unsigned n = 0; n < all.threads; ++n) {
      const unsigned i = all.reversed ? all.threads - 1 - n : n;
      if (all.fibres[i].state != State::kRuns) continue;
      all.current = i;
      threadIdx = all.fibres[i].index;
      swapcontext(&all.scheduler, &all.fibres[i].context);
      ended += all.fibres[i].state == State::kEnded;
      ran = true;
    }
    if (!ran) release();
  }
}

inline void run(dim3 grid, dim3 threads, std::function<void()> kernel) {
  Block& all = block();
  gridDim = grid;
  blockDim = threads;
  all.threads = threads.x * threads.y * threads.z;
  if (all.threads == 0 || all.threads > kMaxThreads || grid.x == 0) fail("a launch of no or too many threads", 0);
  all.kernel = std::move(kernel);
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx = dim3(i, 0, 0);
    run_block();
  }
}

}  // namespace shim

// The line of the call tells one barrier of a kernel from another.
inline void block_barrier(int line = __builtin_LINE()) { shim::wait(shim::State::kAtBarrier, line); }

inline float shuffle_xor(float value, int mask, int line = __builtin_LINE()) {
  shim::Fibre& fibre = shim::block().fibres[shim::block().current];
  fibre.sent = value;
  fibre.mask = mask;
  shim::wait(shim::State::kAtShuffle, line);
  return fibre.received;
}

}  // namespace megagap
