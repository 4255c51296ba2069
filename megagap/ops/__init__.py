"""The operations worth a kernel of their own, one per file.

Each call uses the best implementation that this machine has: a compiled kernel of ``csrc/`` if it is built and supports
the tensors, on GPUs flash-attn or apex if installed, else plain torch. ``python -m megagap.ops`` prints the choice and
why.

Every file has the plain form (``reference``), which defines the operation, beside the choice.
"""

from megagap.ops.adamw import adamw_
from megagap.ops.attention import attention
from megagap.ops.rms_norm import add_rms_norm, rms_norm
from megagap.ops.rotary import rotary, rotary_packed
from megagap.ops.softmax import cross_entropy_, losses_of, softmax_gradient_, softmax_statistics
from megagap.ops.swiglu import swiglu

__all__ = [
    "adamw_",
    "add_rms_norm",
    "attention",
    "cross_entropy_",
    "losses_of",
    "rms_norm",
    "rotary",
    "rotary_packed",
    "softmax_gradient_",
    "softmax_statistics",
    "swiglu",
]
