"""What the precisions of ``train.precision`` mean. docs/precision.md compares them."""

from dataclasses import dataclass

import torch

from megagap.config import Optim


@dataclass(frozen=True)
class Precision:
    compute: torch.dtype
    """Of parameters and activations."""
    gradients: torch.dtype
    """In which gradients are accumulated over microbatches, and summed over ranks."""


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    # Micikevicius et al. 2018, section 3.1; bf16 has fp32's range, so that the loss needs no scaling.
    "bf16-mixed": Precision(torch.bfloat16, torch.float32),
    "fp16-mixed": Precision(torch.float16, torch.float32),
    # Godey et al. 2025 (Gaperon).
    "bf16-pure": Precision(torch.bfloat16, torch.bfloat16),
}


def has_masters(optim: Optim) -> bool:
    """Whether parameters in half precision are fp32 masters, rounded. Of bf16 the rest is kept beside them.

    Always but for ``bf16-pure``, and there as Kahan's compensation: what it keeps in bf16 of each update is lost anyway
    to rounding, while 16 bits are enough to lose nothing.
    """
    return optim.rounding in (None, "kahan")


def master_bytes(dtype: torch.dtype, optim: Optim) -> int:
    """Of an element of the masters of parameters in ``dtype``, beside the parameters."""
    return {torch.bfloat16: 2, torch.float16: 4}.get(dtype, 0) if has_masters(optim) else 0
