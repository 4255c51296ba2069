"""What the precisions of ``train.precision`` mean."""

import torch

COMPUTE_DTYPES = {
    "fp32": torch.float32,
    "bf16-mixed": torch.bfloat16,
}
"""Dtype of parameters and activations. Masters, gradient sums and their reduction are fp32 in all of these
(Micikevicius et al. 2018, section 3.1; bf16 has fp32's range, so that the loss needs no scaling), moments too unless
``optim.moments_dtype`` asks for bf16."""
