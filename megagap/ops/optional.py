"""Libraries that are used if installed, for GPUs only: flash-attn and apex. Imported on first use."""

import importlib
import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from megagap.ops import compiled

log = logging.getLogger(__name__)


def gpu_library(name: str, *tensors: Tensor) -> ModuleType | None:
    """The module ``name`` if these tensors are on a GPU, in half precision, and it can be imported."""
    if compiled.LIBRARIES and all(
        tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors
    ):
        return _import(name)
    return None


@cache
def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):  # installed, but broken: warn once
            log.warning("%s cannot be imported and is not used: %s", name, error)
        return None
