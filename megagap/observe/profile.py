"""Where a step's time goes on a GPU: its kernels by kind, from torch's profiler."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "collectives": r"nccl|rccl",
    "attention": r"flash|fmha|sdpa|attention|mha_|cudnn::fusion",
    "loss": r"cross_entropy|softmax|nll_loss",
    "optimizer": r"adam",
    "norms, rotary, SwiGLU": r"rms_norm|rotary|swiglu|silu",
    "matrix products": r"gemm|xmma|cutlass|nvjet|cublas|splitk|Cijk",
    "embedding": r"embedding|indexSelect|index_select",
    "copies and casts": r"copy|memcpy|memset|cast|FillFunctor|CatArray",
    "reductions": r"reduce",
    "elementwise": r"elementwise",
}
"""Each kind's pattern in the name of a kernel, tried in this order; what matches none is "other"."""

MOST_KERNELS = 40
"""Kernels listed by name in the report."""


@dataclass
class KernelTime:
    """All launches of one kernel, or of one kind, in a step."""

    milliseconds: float = 0.0
    launches: float = 0.0

    def add(self, milliseconds: float, launches: float) -> None:
        self.milliseconds += milliseconds
        self.launches += launches


@dataclass(frozen=True)
class Profile:
    """Means over the profiled steps."""

    by_kind: dict[str, KernelTime]
    by_kernel: dict[str, KernelTime]

    def as_dict(self) -> dict[str, Any]:
        kernels = sorted(self.by_kernel.items(), key=lambda item: -item[1].milliseconds)[:MOST_KERNELS]
        return {
            "by_kind": {kind: vars(time) for kind, time in self._sorted_kinds()},
            "by_kernel": {name: vars(time) for name, time in kernels},
        }

    def table(self) -> Table:
        total = sum(time.milliseconds for time in self.by_kind.values()) or 1.0
        table = Table("kind", "ms per step", "share", "kernels", title="GPU time of a step")
        for kind, time in self._sorted_kinds():
            share = f"{time.milliseconds / total:.1%}"
            table.add_row(kind, f"{time.milliseconds:.2f}", share, f"{time.launches:.0f}")
        table.add_row("all", f"{total:.2f}", "", f"{sum(time.launches for time in self.by_kind.values()):.0f}")
        return table

    def _sorted_kinds(self) -> list[tuple[str, KernelTime]]:
        return sorted(self.by_kind.items(), key=lambda item: -item[1].milliseconds)


def kind_of(kernel: str) -> str:
    """The key of :data:`KINDS` that a kernel's name belongs to, or ``other``."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def profile_steps(step: Callable[[], object], steps: int) -> Profile:
    """Run ``step`` ``steps`` times under the profiler. It slows the host, so only the times of kernels are kept."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    by_kind: dict[str, KernelTime] = defaultdict(KernelTime)
    by_kernel: dict[str, KernelTime] = defaultdict(KernelTime)
    for event in profiler.events() or []:
        if event.device_type == DeviceType.CUDA:
            milliseconds = event.time_range.elapsed_us() / 1e3 / steps
            by_kind[kind_of(event.name)].add(milliseconds, 1 / steps)
            by_kernel[event.name].add(milliseconds, 1 / steps)
    return Profile(dict(by_kind), dict(by_kernel))
