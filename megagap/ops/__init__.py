"""The operations worth a kernel of their own, one a file: compiled where it is built and fits, else plain torch.

Every file holds the plain form (``reference``), which says what the operation means, beside the choice.
"""

from megagap.ops.rms_norm import rms_norm
from megagap.ops.rotary import rotary
from megagap.ops.swiglu import swiglu

__all__ = ["rms_norm", "rotary", "swiglu"]
