// AdamW (Loshchilov & Hutter 2019) over flat parameters in one pass, with torch.optim.AdamW's formula.
#include "gpu/dispatch.h"
#include "gpu/elements.h"
#include "gpu/kernels.h"

namespace megagap::gpu {
namespace {

constexpr int kAdamBlock = 256;  // threads
constexpr int kAdamBlocks = 2;   // at once on a multiprocessor: for more of them, nvcc would spill registers
constexpr int kAdamWidth = 4;   // elements: 16 bytes of float, 8 of bfloat16

// Chunks that a thread has in flight. Random bits take the registers of one.
template <bool kStochastic>
constexpr int kAdamChunks = kStochastic ? 1 : 2;

struct AdamSettings {
  double lr, beta1, beta2;
  float decay, eps;  // decay: 1 - lr * weight_decay
  float keep1, take1, keep2, take2;  // beta1, 1 - beta1, beta2, 1 - beta2
};

// As in cpu/kernels.h: element i of a buffer is element first + i, row by row, of a rectangle whose rows of `columns`
// elements start `pitch` elements apart in the global tensor, the first at `offset`.
struct Rounding {
  int64_t key, first, columns, pitch, offset;
};

struct Words {
  uint32_t word0, word1, word2, word3;
};

// Philox4x32-7 (Salmon et al. 2011): a pure function of key, step, stream and counter.
MEGAGAP_DEVICE Words philox(uint64_t key, uint32_t step, uint32_t stream, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = step, c3 = stream;
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// The random bits of consecutive elements of a buffer: a counter has those of kShare neighbours in the global tensor, 16
// or 32 of each.
template <int kShare>
class RandomBits {
 public:
  MEGAGAP_DEVICE RandomBits(const Rounding& place, uint32_t step, int64_t index)
      : place_(place), step_(step) {
    const int64_t local = place.first + index;
    const bool is_whole = place.columns == place.pitch;  // then rows follow each other, and no division is needed
    const int64_t row = is_whole ? 0 : local / place.columns;
    left_ = is_whole ? INT64_MAX : (row + 1) * place.columns - local;
    element_ = place.offset + local + row * (place.pitch - place.columns);
  }

  MEGAGAP_DEVICE uint32_t next() {
    if (counter_ != element_ / kShare) {
      counter_ = element_ / kShare;
      const uint32_t stream = kShare == 8 ? 0 : 1;
      words_ = philox(static_cast<uint64_t>(place_.key), step_, stream, static_cast<uint64_t>(counter_));
    }
    const int64_t number = element_ * 4 / kShare;
    const uint32_t low = number & 1 ? words_.word1 : words_.word0;
    const uint32_t high = number & 1 ? words_.word3 : words_.word2;
    const uint32_t word = number & 2 ? high : low;
    const uint32_t bits = kShare == 4 ? word : element_ & 1 ? word >> 16 : word & 0xffffu;
    ++element_;
    if (--left_ == 0) {
      left_ = place_.columns;
      element_ += place_.pitch - place_.columns;
    }
    return bits;
  }

 private:
  const Rounding& place_;  // a parameter of the kernel: takes no registers
  uint32_t step_;
  int64_t element_, left_;
  int64_t counter_ = -1;
  Words words_ = {};
};

// Rounded away from zero with the probability that the truncated bits represent: 16 random bits are added to them.
MEGAGAP_DEVICE float round_at_random(float value, uint32_t random) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return __uint_as_float((bits + random) & 0xffff0000u);
}

// The float that is kept as a bfloat16 and a remainder, as ops/remainder.py defines them; 0: the bfloat16 itself.
MEGAGAP_DEVICE float joined(BFloat16 value, uint32_t remainder) {
  return __uint_as_float((static_cast<uint32_t>(value.bits) << 16) + (remainder ^ 0x8000u) - 0x8000u);
}

MEGAGAP_DEVICE float joined(float value, uint32_t) { return value; }

struct AdamElement {
  float parameter, exp_avg, exp_avg_sq;
};

MEGAGAP_DEVICE AdamElement adam_update(AdamElement old, float grad, float step_size, float root2,
                                       const AdamSettings& settings) {
  const float first = settings.keep1 * old.exp_avg + settings.take1 * grad;
  const float second = settings.keep2 * old.exp_avg_sq + settings.take2 * grad * grad;
  const float denominator = sqrtf(second) / root2 + settings.eps;
  return {old.parameter * settings.decay - step_size * first / denominator, first, second};
}

// remainder: null, or that of a parameter in bfloat16.
template <typename P, typename M, typename G>
struct AdamBuffers {
  P* parameter;
  Bits16* remainder;
  M *exp_avg, *exp_avg_sq;
  const G* grad;
};

// Neighbouring elements of all buffers, in registers.
template <typename P, typename M, typename G, int kWidth>
struct AdamChunk {
  Chunk<P, kWidth> values;
  Chunk<Bits16, kWidth> rests;
  Chunk<M, kWidth> firsts, seconds;
  Chunk<G, kWidth> grads;

  MEGAGAP_DEVICE void load_from(const AdamBuffers<P, M, G>& buffers, int64_t index) {
    values = load<kWidth>(buffers.parameter + index);
    rests = {};
    if (sizeof(P) == 2 && buffers.remainder != nullptr) rests = load<kWidth>(buffers.remainder + index);
    firsts = load<kWidth>(buffers.exp_avg + index);
    seconds = load<kWidth>(buffers.exp_avg_sq + index);
    grads = load<kWidth>(buffers.grad + index);
  }

  // Updates the elements, which are those from `index` on, in the buffers.
  template <bool kStochastic, typename Update>
  MEGAGAP_DEVICE void store_updated(const AdamBuffers<P, M, G>& buffers, int64_t index, const Update& update,
                                    const Rounding& place, uint32_t update_number) const {
    Chunk<P, kWidth> to_value;
    Chunk<Bits16, kWidth> to_rest;
    Chunk<M, kWidth> to_first, to_second;
    const bool split = sizeof(P) == 2 && buffers.remainder != nullptr;
    RandomBits<8> of_parameter(place, update_number, index);
    RandomBits<4> of_moments(place, update_number, index);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float old = joined(values.element(i), rests.element(i).bits);
      AdamElement now = update({old, firsts.get(i), seconds.get(i)}, grads.get(i));
      if (split) {
        // All NaN become one: of some, the upper half is a number.
        const uint32_t bits = now.parameter == now.parameter ? __float_as_uint(now.parameter) : 0x7fc00000u;
        to_value.set_bits(i, (bits + 0x8000u) >> 16);
        to_rest.set_bits(i, bits & 0xffffu);
      } else {
        constexpr bool kAtRandom = sizeof(P) == 2 && kStochastic;
        to_value.set(i, kAtRandom ? round_at_random(now.parameter, of_parameter.next()) : now.parameter);
      }
      if (sizeof(M) == 2 && kStochastic) {
        const uint32_t random = of_moments.next();
        now.exp_avg = round_at_random(now.exp_avg, random & 0xffffu);
        now.exp_avg_sq = round_at_random(now.exp_avg_sq, random >> 16);
      }
      to_first.set(i, now.exp_avg);
      to_second.set(i, now.exp_avg_sq);
    }
    store(buffers.parameter + index, to_value);
    if (split) store(buffers.remainder + index, to_rest);
    store(buffers.exp_avg + index, to_first);
    store(buffers.exp_avg_sq + index, to_second);
  }
};

// kStochastic: what is rounded is rounded at random.
template <typename P, typename M, typename G, int kWidth, bool kStochastic>
__global__ void __launch_bounds__(kAdamBlock, kAdamBlocks)
    adamw_kernel(AdamBuffers<P, M, G> buffers, const float* __restrict__ grad_scale,
                 const float* __restrict__ found_inf, const float* __restrict__ step, int64_t size,
                 AdamSettings settings, Rounding place) {
  __shared__ float shared[2];
  if (*found_inf != 0.0f) return;  // the same for all threads
  if (threadIdx.x == 0) {
    shared[0] = static_cast<float>(settings.lr / (1.0 - pow(settings.beta1, static_cast<double>(*step))));
    shared[1] = static_cast<float>(sqrt(1.0 - pow(settings.beta2, static_cast<double>(*step))));
  }
  block_barrier();
  const float step_size = shared[0], root2 = shared[1], divisor = *grad_scale;
  const uint32_t update_number = static_cast<uint32_t>(*step);
  const auto update = [&](const AdamElement& old, float gradient) {
    return adam_update(old, gradient / divisor, step_size, root2, settings);
  };

  constexpr int kChunks = kAdamChunks<kStochastic>;
  constexpr int64_t kStep = int64_t{kAdamBlock} * kWidth;
  for (int64_t block = int64_t{blockIdx.x} * kChunks * kStep; block < size;
       block += int64_t{gridDim.x} * kChunks * kStep) {
    const int64_t mine = block + int64_t{threadIdx.x} * kWidth;
    AdamChunk<P, M, G, kWidth> chunks[kChunks];
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int64_t index = mine + k * kStep;
      if (index + kWidth <= size) chunks[k].load_from(buffers, index);
    }
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int64_t index = mine + k * kStep;
      if (index + kWidth > size) continue;
      chunks[k].template store_updated<kStochastic>(buffers, index, update, place, update_number);
    }
    // What is left at the end: fewer elements than a chunk.
    const int64_t rest = size - size % kWidth + threadIdx.x;
    if (kWidth > 1 && block + kChunks * kStep >= size && rest < size) {
      AdamChunk<P, M, G, 1> chunk;
      chunk.load_from(buffers, rest);
      chunk.template store_updated<kStochastic>(buffers, rest, update, place, update_number);
    }
  }
}

template <typename P, typename M, typename G, bool kStochastic>
int adamw(void* parameter, void* remainder, void* exp_avg, void* exp_avg_sq, const void* grad, const float* grad_scale,
          const float* found_inf, const float* step, int64_t size, const AdamSettings& settings,
          const Rounding& place, void* stream) {
  const AdamBuffers<P, M, G> buffers = {static_cast<P*>(parameter), static_cast<Bits16*>(remainder),
                                        static_cast<M*>(exp_avg), static_cast<M*>(exp_avg_sq),
                                        static_cast<const G*>(grad)};
  const bool whole = aligned_for<kAdamWidth>(buffers.parameter) && aligned_for<kAdamWidth>(buffers.remainder) &&
                     aligned_for<kAdamWidth>(buffers.exp_avg) && aligned_for<kAdamWidth>(buffers.exp_avg_sq) &&
                     aligned_for<kAdamWidth>(buffers.grad);
  const int64_t block_elements = int64_t{kAdamBlock} * kAdamChunks<kStochastic> * (whole ? kAdamWidth : 1);
  return launch(whole ? adamw_kernel<P, M, G, kAdamWidth, kStochastic> : adamw_kernel<P, M, G, 1, kStochastic>,
                ceil_divide(size, block_elements), dim3(kAdamBlock), stream, buffers, grad_scale, found_inf, step, size,
                settings, place);
}

}  // namespace
}  // namespace megagap::gpu

extern "C" int megagap_gpu_adamw(int parameter_type, int moment_type, int grad_type, void* parameter, void* exp_avg,
                                 void* exp_avg_sq, const void* grad, const float* grad_scale, const float* found_inf,
                                 const float* step, int64_t size, double lr, double beta1, double beta2, double eps,
                                 double weight_decay, const int64_t* rounding, void* remainder, void* stream) {
  using megagap::gpu::BFloat16;
  const auto number = [](double value) { return static_cast<float>(value); };
  const megagap::gpu::AdamSettings settings = {lr,           beta1,            beta2,         number(1 - lr * weight_decay),
                                          number(eps),  number(beta1),    number(1 - beta1),
                                          number(beta2), number(1 - beta2)};
  const megagap::gpu::Rounding place =
      rounding == nullptr ? megagap::gpu::Rounding{0, 0, 1, 1, 0}
                          : megagap::gpu::Rounding{rounding[0], rounding[1], rounding[2], rounding[3], rounding[4]};
  if (remainder != nullptr && parameter_type != kMegagapBFloat16) return kMegagapUnsupported;
  if (size == 0) return 0;
  const auto run = [&](auto* kernels) {
    return kernels(parameter, remainder, exp_avg, exp_avg_sq, grad, grad_scale, found_inf, step, size, settings, place,
                   stream);
  };
  const auto types = [&](int p, int m, int g) { return parameter_type == p && moment_type == m && grad_type == g; };
  namespace gpu = megagap::gpu;
  if (rounding == nullptr) {
    if (types(kMegagapFloat, kMegagapFloat, kMegagapFloat)) return run(gpu::adamw<float, float, float, false>);
    if (types(kMegagapFloat, kMegagapFloat, kMegagapBFloat16)) return run(gpu::adamw<float, float, BFloat16, false>);
    if (types(kMegagapBFloat16, kMegagapFloat, kMegagapFloat)) return run(gpu::adamw<BFloat16, float, float, false>);
    if (types(kMegagapBFloat16, kMegagapFloat, kMegagapBFloat16)) {
      return run(gpu::adamw<BFloat16, float, BFloat16, false>);
    }
    if (types(kMegagapBFloat16, kMegagapBFloat16, kMegagapBFloat16)) {
      return run(gpu::adamw<BFloat16, BFloat16, BFloat16, false>);
    }
  } else {
    if (types(kMegagapFloat, kMegagapBFloat16, kMegagapFloat)) return run(gpu::adamw<float, BFloat16, float, true>);
    if (types(kMegagapBFloat16, kMegagapFloat, kMegagapFloat)) return run(gpu::adamw<BFloat16, float, float, true>);
    if (types(kMegagapBFloat16, kMegagapFloat, kMegagapBFloat16)) {
      return run(gpu::adamw<BFloat16, float, BFloat16, true>);
    }
    if (types(kMegagapBFloat16, kMegagapBFloat16, kMegagapFloat)) {
      return run(gpu::adamw<BFloat16, BFloat16, float, true>);
    }
    if (types(kMegagapBFloat16, kMegagapBFloat16, kMegagapBFloat16)) {
      return run(gpu::adamw<BFloat16, BFloat16, BFloat16, true>);
    }
  }
  return kMegagapUnsupported;
}
