"""What a layer keeps from its forward to its backward pass, and what it computes again (``train.recompute``).

``selective`` drops what one elementwise pass makes again from something that is kept anyway: outputs of norms and
SwiGLU's product, which are inputs of matrix products, and the probabilities of attention where a kernel keeps them.
``full`` keeps what enters a layer and runs its forward pass again in its backward pass (Chen et al. 2016).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"]


def run_again_in_backward(
    function: Callable[..., Any], *arguments: Any, while_again: Callable[[], AbstractContextManager[None]]
) -> Any:
    """``function(*arguments)``, of which only the arguments are kept; it runs again in the backward pass.

    ``while_again`` makes the context in which it does. What the function reads besides its arguments, such as
    parameters, is read again. Nothing in the model is random, so that no generator's state is kept.
    """
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        determinism_check="none",  # it compares devices, which a trace pretends (``planning/pretend.py``)
        context_fn=lambda: (nullcontext(), while_again()),
    )
