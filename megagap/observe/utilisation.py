"""How much of the hardware's peak a step uses (model FLOPs utilisation; Chowdhery et al. 2022, appendix B)."""

import re
import tomllib
from functools import cache
from pathlib import Path

import torch

DTYPES = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "fp32"}
"""The key of ``peaks.toml`` for matrix products in a dtype."""


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Data-sheet peak for dense matrix products in ``dtype``; None if the device, or the dtype on it, is unknown."""
    if device.type != "cuda":
        return None
    return data_sheet_peaks(torch.cuda.get_device_name(device)).get(DTYPES.get(dtype, ""))


@cache
def data_sheet_peaks(name: str) -> dict[str, float]:
    """Peaks in TFLOP/s by dtype (``peaks.toml``) of the device of this name, such as ``NVIDIA H100 80GB HBM3``.

    Empty if it is unknown: a guessed peak would make a wrong MFU look right. So it is for a part of a GPU (MIG).
    """
    words = set(re.split(r"[^0-9A-Za-z]+", name))
    entries = tomllib.loads(Path(__file__).with_name("peaks.toml").read_text(encoding="utf-8"))
    matching = [key for key in entries if words.issuperset(key.split())]
    if not matching or "MIG" in words:
        return {}
    entry = entries[max(matching, key=lambda key: len(key.split()))]
    return {dtype: entry[dtype] for dtype in ("bf16", "fp32")}


def peak_memory_bytes(device: torch.device) -> int:
    """Most device memory allocated so far; on CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
