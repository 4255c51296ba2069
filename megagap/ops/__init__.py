"""The operations worth a kernel of their own, one a file.

On CPU the compiled kernel where it is built and fits, on GPUs flash-attn or apex where they are installed, else plain
torch.

Every file holds the plain form (``reference``), which says what the operation means, beside the choice.
"""

from megagap.ops.attention import attention
from megagap.ops.rms_norm import rms_norm
from megagap.ops.rotary import rotary
from megagap.ops.swiglu import swiglu

__all__ = ["attention", "rms_norm", "rotary", "swiglu"]
