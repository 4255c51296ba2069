"""The figures of a device (``devices.toml``)."""

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megagap.errors import ConfigError
from megagap.observe.utilisation import data_sheet_peaks

FILE = Path(__file__).with_name("devices.toml")

DTYPES = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "fp32", torch.float64: "fp32"}
"""A dtype's key in the tables of rates."""


@dataclass(frozen=True)
class Device:
    """One entry of the file, whose header explains the fields."""

    key: str
    name: str
    kind: str
    capability: tuple[int, int]
    memory_gib: float
    product_tflops: dict[str, list[tuple[int, float]]]
    attention_tflops: dict[str, dict[str, dict[str, tuple[float, float]]]]
    bandwidth_tb: float
    mixed_bandwidth: float
    launch_us: float
    clears_per_product: int
    link_gb: float
    node: int
    network_gb: float
    sources: list[str] = field(default_factory=list)

    @property
    def peak_tflops(self) -> dict[str, float]:
        """Of the data sheet, dense, by dtype: what MFU is measured against."""
        return data_sheet_peaks(self.name)

    @property
    def torch_device(self) -> torch.device:
        """The device that a tensor on it reports."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", 0)  # ROCm's are called cuda, too

    def product_rate(self, dtype: torch.dtype, smallest: int) -> float:
        """FLOP/s of a matrix product whose smallest dimension is ``smallest``."""
        steps = self.product_tflops[DTYPES[dtype]]
        reached = [rate for size, rate in steps if smallest >= size]
        rate = reached[-1] if reached else steps[0][1] * max(smallest, 1) / steps[0][0]
        return rate * 1e12

    def attention_rate(self, kernel: str, dtype: torch.dtype, head: int, *, backward: bool) -> float:
        """FLOP/s of a causal attention kernel, of the causal half."""
        by_dtype = self.attention_tflops.get(kernel) or next(iter(self.attention_tflops.values()))
        by_head = by_dtype.get(DTYPES[dtype]) or next(iter(by_dtype.values()))
        sizes = sorted(map(int, by_head))
        size = max((size for size in sizes if size <= head), default=sizes[0])
        return by_head[str(size)][backward] * min(1.0, head / size) * 1e12

    def with_rates(self, product_tflops: float | None, bandwidth_tb: float | None) -> "Device":
        """With other figures for large bf16 products, the smaller ones in proportion, and for memory."""
        device = self
        if product_tflops is not None:
            steps = self.product_tflops["bf16"]
            scaled = [(size, rate * product_tflops / steps[-1][1]) for size, rate in steps]
            device = replace(device, product_tflops={**self.product_tflops, "bf16": scaled})
        return device if bandwidth_tb is None else replace(device, bandwidth_tb=bandwidth_tb)

    def assumptions(self) -> list[str]:
        """The figures that matter most, and their sources, one per line."""
        products = ", ".join(
            f"{dtype} {steps[-1][1]:g} (all dimensions from {steps[-1][0]:,} on)"
            for dtype, steps in self.product_tflops.items()
        )
        return [
            f"matrix products in TFLOP/s: {products}",
            f"memory {self.bandwidth_tb:g} TB/s; {self.launch_us:g} µs per kernel",
            *self.sources,
        ]


def known_devices() -> list[str]:
    return list(_entries())


def load_device(key: str) -> Device:
    """Raises :class:`ConfigError` for an unknown one."""
    entries = _entries()
    if key not in entries:
        raise ConfigError(f"--device {key}: unknown; possible: {', '.join(entries)}")
    entry = dict(entries[key])
    entry["capability"] = tuple(entry["capability"])
    return Device(key=key, **entry)


def _entries() -> dict[str, dict[str, Any]]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))
