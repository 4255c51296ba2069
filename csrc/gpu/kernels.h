// The launchers of the kernels. Pointers are to device memory, sizes and strides count elements, a stream is a
// cudaStream_t or hipStream_t. Each returns 0, a runtime's error code, or kUnsupported; nothing waits for the device.
#pragma once

#include <cstdint>

extern "C" {

enum MegagapType : int { kMegagapFloat = 0, kMegagapBFloat16 = 1, kMegagapHalf = 2 };

constexpr int kMegagapUnsupported = -1;  // an element type without kernels, or a row of 2^30 elements or more

const char* megagap_gpu_error(int code);

// y = weight * gain_scale * x / sqrt(mean(x^2) + eps) over rows [rows, size]; with a residual, x + residual takes the
// place of x and is written to total (else both are null). rstd [rows] in float.
int megagap_gpu_rms_norm(int type, const void* x, const void* residual, const void* weight, void* y, void* total,
                         float* rstd, int64_t rows, int64_t size, float eps, float gain_scale, void* stream);

// Rows of the workspace `partial` [parts, size], in float, that the backward pass needs on the current device.
int64_t megagap_gpu_rms_norm_parts(int type, int64_t rows, int64_t size);

// grad_total (may be null) is added to grad_x. grad_weight is summed over `parts` parts, then over these: equal bits
// for equal parts.
int megagap_gpu_rms_norm_backward(int type, const void* grad, const void* grad_total, const void* x,
                                  const void* weight, const float* rstd, void* grad_x, void* grad_weight,
                                  float* partial, int64_t parts, int64_t rows, int64_t size, float gain_scale,
                                  void* stream);

// One of the tensors to rotate, [batch, length, heads, size] with unit stride in the last dimension.
struct MegagapRotated {
  const void* in;
  void* out;  // may be in
  int64_t heads;
  int64_t in_batch, in_token, in_head, out_batch, out_token, out_head;  // strides
};

// Rotates the heads of q and k (k.heads may be 0). Tables [table_rows, size] in float; the row of a token is
// positions[token] or, where positions is null, its number modulo table_rows. A position outside of them gives NaN.
int megagap_gpu_rotary(int type, const MegagapRotated* q, const MegagapRotated* k, const float* cos, const float* sin,
                       const int64_t* positions, int64_t table_rows, int64_t batch, int64_t length, int64_t size,
                       int interleaved, int backward, void* stream);

// y = silu(gate) * up over rows [rows, size]; the inputs' rows may be strided, y is contiguous. The
// rows of both gradients begin to_stride apart.
int megagap_gpu_swiglu(int type, const void* gate, const void* up, void* y, int64_t rows, int64_t size,
                       int64_t gate_stride, int64_t up_stride, void* stream);
int megagap_gpu_swiglu_backward(int type, const void* grad, const void* gate, const void* up, void* grad_gate,
                                void* grad_up, int64_t rows, int64_t size, int64_t grad_stride, int64_t gate_stride,
                                int64_t up_stride, int64_t to_stride, void* stream);

// Logits [rows, size] are the columns [first, first + size) of a vocabulary, targets ids in it; one below 0 is ignored.
// statistics [3, rows]: the maximum, the sum of exp(logit - maximum), and the logit at the target, 0 where that is in
// none of the columns.
int megagap_gpu_cross_entropy_rows(int type, const void* logits, const int64_t* targets, int64_t first,
                                   float* statistics, int64_t rows, int64_t size, int64_t stride, void* stream);

// In place, from the statistics of the whole vocabulary, whose log_sum_exp is maximum + log(sum):
// logits = (exp(logit - log_sum_exp) * (1 + 2 * z_loss * log_sum_exp) - [column == target]) * scale; 0 where the target
// is ignored. scale: one float.
int megagap_gpu_cross_entropy_rows_gradient(int type, void* logits, const int64_t* targets, int64_t first,
                                            const float* statistics, const float* scale, float z_loss, int64_t rows,
                                            int64_t size, int64_t stride, void* stream);

// Both at once, of a whole vocabulary.
int megagap_gpu_cross_entropy(int type, void* logits, const int64_t* targets, const float* scale, float z_loss,
                              float* statistics, int64_t rows, int64_t size, int64_t stride, void* stream);

// AdamW over flat [size]. grad_scale, found_inf, step: one float each on the device. `remainder`, unless null: 16 bits
// [size] that make a parameter in bfloat16 a float (ops/remainder.py). `rounding`, unless null: what else is in bfloat16,
// parameter or moments, is rounded up or down at random, with the bits of this place, else to the nearest.
int megagap_gpu_adamw(int parameter_type, int moment_type, int grad_type, void* parameter, void* exp_avg,
                      void* exp_avg_sq, const void* grad, const float* grad_scale, const float* found_inf,
                      const float* step, int64_t size, double lr, double beta1, double beta2, double eps,
                      double weight_decay, const int64_t* rounding, void* remainder, void* stream);
}
