"""The operations worth a kernel of their own, one a file.

For each call the best that this machine has is chosen: a compiled kernel of ``csrc/`` where it is built and fits, on
GPUs flash-attn or apex where they are installed, else plain torch. ``python -m megagap.ops`` prints the choice and why.

Every file holds the plain form (``reference``), which says what the operation means, beside the choice.
"""

from megagap.ops.adamw import adamw_
from megagap.ops.attention import attention
from megagap.ops.cross_entropy import softmax_gradient_, softmax_statistics
from megagap.ops.rms_norm import add_rms_norm, rms_norm
from megagap.ops.rotary import rotary, rotary_
from megagap.ops.swiglu import swiglu

__all__ = [
    "adamw_",
    "add_rms_norm",
    "attention",
    "rms_norm",
    "rotary",
    "rotary_",
    "softmax_gradient_",
    "softmax_statistics",
    "swiglu",
]
