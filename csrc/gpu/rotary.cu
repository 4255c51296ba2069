// Rotary position embeddings (Su et al. 2021) of q and k in one pass, half-split or interleaved, also in place.
//
// A thread keeps the table entries of its pairs in registers and rotates them in several heads of a token.
#include "gpu/dispatch.h"
#include "gpu/elements.h"
#include "gpu/kernels.h"

namespace megagap::gpu {
namespace {

constexpr int kRotaryBlock = 256;
constexpr int kHeads = 4;  // that a thread has in flight

// One head of one token.
template <typename T>
struct Head {
  const T* in;
  T* out;
};

// Head number `head` of q's heads followed by k's.
template <typename T>
MEGAGAP_DEVICE Head<T> locate(const MegagapRotated& q, const MegagapRotated& k, int64_t batch, int64_t place,
                              int64_t head) {
  const bool in_q = head < q.heads;
  head = in_q ? head : head - q.heads;
  const T* in = static_cast<const T*>(in_q ? q.in : k.in);
  T* out = static_cast<T*>(in_q ? q.out : k.out);
  return {in + batch * (in_q ? q.in_batch : k.in_batch) + place * (in_q ? q.in_token : k.in_token) +
              head * (in_q ? q.in_head : k.in_head),
          out + batch * (in_q ? q.out_batch : k.out_batch) + place * (in_q ? q.out_token : k.out_token) +
              head * (in_q ? q.out_head : k.out_head)};
}

// Cosines and sines of one piece of a head.
template <int kWidth>
struct Angles {
  Chunk<float, kWidth> cos, sin;
};

template <int kWidth>
MEGAGAP_DEVICE Angles<kWidth> load_angles(const float* cos, const float* sin, int64_t entry, bool known) {
  Angles<kWidth> angles = {load<kWidth>(cos + entry), load<kWidth>(sin + entry)};
  if (!known) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) angles.cos.set(i, __uint_as_float(0x7fc00000u));
  }
  return angles;
}

// Rotates pairs (a[i], b[j]) by the angles of their places: a' = a cos_a - b sin_a, b' = b cos_b + a sin_b; backward by
// the transposed matrix.
template <typename T, int kWidth>
MEGAGAP_DEVICE void rotate(Chunk<T, kWidth>& to_a, int i, Chunk<T, kWidth>& to_b, int j, const Chunk<T, kWidth>& from_a,
                           const Chunk<T, kWidth>& from_b, const Angles<kWidth>& at_a, const Angles<kWidth>& at_b,
                           bool backward) {
  const float a = from_a.get(i), b = from_b.get(j);
  const float sin_a = backward ? -at_b.sin.get(j) : at_a.sin.get(i);
  const float sin_b = backward ? -at_a.sin.get(i) : at_b.sin.get(j);
  to_a.set(i, a * at_a.cos.get(i) - b * sin_a);
  to_b.set(j, b * at_b.cos.get(j) + a * sin_b);
}

// A thread's pieces of a head are half a head apart, or side by side where neighbours are pairs. threadIdx.x counts
// them, threadIdx.y heads, threadIdx.z tokens. The output may be the input.
template <typename T, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kRotaryBlock)
    rotary_kernel(MegagapRotated q, MegagapRotated k, const float* __restrict__ cos, const float* __restrict__ sin,
                  const int64_t* __restrict__ positions, int64_t table_rows, int64_t tokens, int64_t length, int size,
                  bool backward) {
  const int heads = static_cast<int>(q.heads + k.heads), half = size / 2, apart = static_cast<int>(blockDim.y);
  const int64_t together = blockDim.z;
  for (int64_t token = blockIdx.x * together + threadIdx.z; token < tokens; token += gridDim.x * together) {
    const int64_t batch = token / length, place = token - batch * length;
    const int64_t row = positions ? positions[token] : token % table_rows;
    const bool known = row >= 0 && row < table_rows;  // else NaN, never a silent error
    const int64_t entry = known ? row * size : 0;
    for (int piece = static_cast<int>(threadIdx.x) * kWidth; piece < half; piece += static_cast<int>(blockDim.x) * kWidth) {
      const int first = kInterleaved ? 2 * piece : piece, second = kInterleaved ? first + kWidth : piece + half;
      const auto at_a = load_angles<kWidth>(cos, sin, entry + first, known);
      const auto at_b = load_angles<kWidth>(cos, sin, entry + second, known);
      for (int begin = static_cast<int>(threadIdx.y); begin < heads; begin += kHeads * apart) {
        Chunk<T, kWidth> a[kHeads], b[kHeads];
#pragma unroll
        for (int j = 0; j < kHeads; ++j) {
          if (begin + j * apart >= heads) continue;
          const T* in = locate<T>(q, k, batch, place, begin + j * apart).in;
          a[j] = load<kWidth>(in + first);
          b[j] = load<kWidth>(in + second);
        }
#pragma unroll
        for (int j = 0; j < kHeads; ++j) {
          if (begin + j * apart >= heads) continue;
          T* out = locate<T>(q, k, batch, place, begin + j * apart).out;
          Chunk<T, kWidth> to_a, to_b;
          if constexpr (kInterleaved && kWidth > 1) {
#pragma unroll
            for (int i = 0; i < kWidth; i += 2) {
              rotate(to_a, i, to_a, i + 1, a[j], a[j], at_a, at_a, backward);
              rotate(to_b, i, to_b, i + 1, b[j], b[j], at_b, at_b, backward);
            }
          } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) rotate(to_a, i, to_b, i, a[j], b[j], at_a, at_b, backward);
          }
          store(out + first, to_a);
          store(out + second, to_b);
        }
      }
    }
  }
}

template <typename T>
bool whole_pieces(const MegagapRotated& x) {
  const auto fits = [](const void* address, int64_t batch, int64_t token, int64_t head) {
    return aligned(static_cast<const T*>(address), batch) && token % kVector<T> == 0 && head % kVector<T> == 0;
  };
  return x.heads == 0 || (fits(x.in, x.in_batch, x.in_token, x.in_head) &&
                          fits(x.out, x.out_batch, x.out_token, x.out_head));
}

template <typename T>
int rotary(const MegagapRotated& q, const MegagapRotated& k, const float* cos, const float* sin,
           const int64_t* positions, int64_t table_rows, int64_t batch, int64_t length, int64_t size, bool interleaved,
           bool backward, void* stream) {
  const bool whole = size % (2 * kVector<T>) == 0 && whole_pieces<T>(q) && whole_pieces<T>(k) && aligned(cos) &&
                     aligned(sin);
  const int64_t pieces = whole ? size / 2 / kVector<T> : size / 2, heads = ceil_divide(q.heads + k.heads, kHeads);
  const int64_t x = pieces < kRotaryBlock ? pieces : kRotaryBlock;
  const int64_t y = heads < kRotaryBlock / x ? heads : kRotaryBlock / x, most = kRotaryBlock / (x * y);
  const int64_t z = batch * length < most ? batch * length : most < 64 ? most : 64;  // CUDA's limit of blockDim.z
  auto* kernel = interleaved ? (whole ? rotary_kernel<T, kVector<T>, true> : rotary_kernel<T, 1, true>)
                             : (whole ? rotary_kernel<T, kVector<T>, false> : rotary_kernel<T, 1, false>);
  return launch(kernel, ceil_divide(batch * length, z),
                dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)), stream, q, k, cos,
                sin, positions, table_rows, batch * length, length, size, backward);
}

}  // namespace
}  // namespace megagap::gpu

extern "C" int megagap_gpu_rotary(int type, const MegagapRotated* q, const MegagapRotated* k, const float* cos,
                                  const float* sin, const int64_t* positions, int64_t table_rows, int64_t batch,
                                  int64_t length, int64_t size, int interleaved, int backward, void* stream) {
  if (size > megagap::gpu::kMaxRow || q->heads + k->heads > megagap::gpu::kMaxRow) return kMegagapUnsupported;
  if (batch == 0 || length == 0 || size == 0 || q->heads + k->heads == 0) return 0;
  return megagap::gpu::for_type(type, [&](auto element) {
    return megagap::gpu::rotary<decltype(element)>(*q, *k, cos, sin, positions, table_rows, batch, length, size,
                                              interleaved != 0, backward != 0, stream);
  });
}
