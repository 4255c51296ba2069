"""The compiled kernels of ``csrc/``: which ones this installation has, and which tensors they support."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megagap.errors import OPS_SWITCH, ops_choice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The kernels' dtypes; they compute in fp32."""


def _load() -> bool:
    # An invalid choice is reported when a tool starts and by the first operation, not by an import.
    if os.environ.get(OPS_SWITCH, "auto") != "auto":
        return False
    try:
        import megagap._C  # noqa: F401  (loading it registers torch.ops.megagap)
    except ImportError as error:
        reason = "they were not built" if isinstance(error, ModuleNotFoundError) else f"they cannot be loaded: {error}"
        warnings.warn(
            f"megagap computes with plain torch, without its compiled kernels: {reason}. "
            "With a C++ compiler, build them with: pip install --no-build-isolation --no-deps -e .",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


AVAILABLE = _load()


DEVICES = frozenset(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))  # ROCm devices are called cuda, too
    if AVAILABLE and torch._C._dispatch_has_kernel_for_dispatch_key("megagap::rms_norm", key)
)
"""Device types with kernels."""


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Choose in this block as if the kernels were compiled for GPUs: to trace a step without a GPU (``planning/``).

    Kernels of other libraries are not used then: they do not accept tensors without storage.
    """
    global DEVICES, LIBRARIES
    before = DEVICES, LIBRARIES
    DEVICES, LIBRARIES = frozenset({"cpu", "cuda"} if AVAILABLE else ()), False
    try:
        yield
    finally:
        DEVICES, LIBRARIES = before


LIBRARIES = True
"""Whether kernels of other libraries may be used if installed (``optional.py``)."""


def supports(*tensors: Tensor) -> bool:
    """Whether there are kernels for these tensors: all on one device and of one supported dtype.

    Raises :class:`ConfigError` if the environment's choice is unknown.
    """
    if not AVAILABLE:
        ops_choice()
        return False
    first = tensors[0]
    return (
        first.dtype in DTYPES
        and first.device.type in DEVICES
        and all(tensor.dtype == first.dtype and tensor.device == first.device for tensor in tensors[1:])
    )
