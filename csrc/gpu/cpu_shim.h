// Runs the kernels of this folder on the CPU, so that the same source is tested without a GPU.
//
// Blocks run one after another; the threads of a block are fibres with stacks of their own. A fibre runs until it ends
// or waits: at a barrier for all threads of its block, at a shuffle for all threads of its wave. What a GPU leaves
// undefined ends the process with a message here: a barrier or shuffle that some threads do not reach, or reach at
// another place, and a shuffle from a thread that does not exist.
//
// One translation unit includes it: -DMEGAGAP_SHIM -DMEGAGAP_WAVE=32 (or 64) -U_FORTIFY_SOURCE, which mistakes jumps
// between stacks for an attack.
#pragma once

#include <setjmp.h>
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

// State of the running fibre.
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

namespace megagap::gpu {
namespace shim {

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kMaxThreads = 1024;

enum class State { kRuns, kAtBarrier, kAtShuffle, kEnded };

struct Fibre {
  jmp_buf where;
  bool exists = false;
  State state;
  dim3 index;
  int line;  // of the barrier or shuffle at which it waits
  float sent, received;
  int mask;
};

struct Block {
  jmp_buf scheduler;
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

// From the running fibre to the scheduler. (Jumps, because swapcontext calls the kernel for the signal mask.)
inline void leave(State state) {
  Fibre& fibre = block().fibres[block().current];
  fibre.state = state;
  if (_setjmp(fibre.where) == 0) _longjmp(block().scheduler, 1);
}

inline void wait(State state, int line) {
  block().fibres[block().current].line = line;
  leave(state);
}

// A fibre is made once and serves one thread of every later block.
inline void serve() {
  for (;;) {
    block().kernel();
    leave(State::kEnded);
  }
}

__attribute__((noinline)) inline void resume(unsigned thread) {
  Block& all = block();
  Fibre& fibre = all.fibres[thread];
  all.current = thread;
  threadIdx = fibre.index;
  if (_setjmp(all.scheduler) != 0) return;
  if (fibre.exists) _longjmp(fibre.where, 1);
  fibre.exists = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = &all.stacks[thread * kStack];
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, serve, 0);
  setcontext(&context);
}

// How many of the threads [begin, end) wait in this state; that they wait at different lines is a fault.
inline unsigned count_waiting(State state, unsigned begin, unsigned end, const char* fault) {
  const Block& all = block();
  unsigned waiting = 0;
  int line = 0;
  for (unsigned i = begin; i < end; ++i) {
    if (all.fibres[i].state != state) continue;
    if (waiting++ == 0) line = all.fibres[i].line;
    if (all.fibres[i].line != line) fail(fault, i);
  }
  return waiting;
}

// Exchanges the values of a wave whose threads all wait for it; false where none does.
inline bool exchange(unsigned begin, unsigned end) {
  Block& all = block();
  const char* fault = "a shuffle that not all threads of a wave reach";
  const unsigned waiting = count_waiting(State::kAtShuffle, begin, end, fault);
  if (waiting == 0) return false;
  if (waiting != end - begin) fail(fault, begin);
  for (unsigned i = begin; i < end; ++i) {
    const unsigned source = i ^ static_cast<unsigned>(all.fibres[i].mask);
    if (source < begin || source >= end) fail("a shuffle from a thread that does not exist", i);
    all.fibres[i].received = all.fibres[source].sent;
  }
  for (unsigned i = begin; i < end; ++i) all.fibres[i].state = State::kRuns;
  return true;
}

inline void pass_barrier() {
  Block& all = block();
  if (count_waiting(State::kAtBarrier, 0, all.threads, "threads of a block wait at different barriers") != all.threads) {
    fail("a barrier that not all threads of the block reach", 0);
  }
  for (unsigned i = 0; i < all.threads; ++i) all.fibres[i].state = State::kRuns;
}

// Runs each wave from one barrier to the next before another begins, so that a missing barrier shows in the results.
inline void run_block() {
  Block& all = block();
  for (unsigned i = 0; i < all.threads; ++i) {
    all.fibres[i].state = State::kRuns;
    all.fibres[i].index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  }
  const unsigned waves = (all.threads + MEGAGAP_WAVE - 1) / MEGAGAP_WAVE;
  unsigned ended = 0;
  for (;;) {
    for (unsigned n = 0; n < waves; ++n) {
      const unsigned begin = (all.reversed ? waves - 1 - n : n) * MEGAGAP_WAVE;
      const unsigned end = begin + MEGAGAP_WAVE < all.threads ? begin + MEGAGAP_WAVE : all.threads;
      do {
        for (unsigned m = begin; m < end; ++m) {
          const unsigned i = all.reversed ? begin + end - 1 - m : m;
          if (all.fibres[i].state != State::kRuns) continue;
          resume(i);
          ended += all.fibres[i].state == State::kEnded;
        }
      } while (exchange(begin, end));
    }
    if (ended == all.threads) return;
    pass_barrier();
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

}  // namespace megagap::gpu
