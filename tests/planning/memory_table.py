"""The tables "does it fit" of the pages, computed: ``python -m tests.planning.memory_table`` rewrites them."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagap.config import Settings, load_recipe
from megagap.planning.devices import Device, load_device
from megagap.planning.memory import GIB, RankMemory, fullest, memory_by_stage

ROOT = Path(__file__).parents[2]
START, END = "<!-- memory table: python -m tests.planning.memory_table -->", "<!-- end of the memory table -->"

MODELS: dict[str, dict[str, Any]] = {
    "Gaperon 1B": {"preset": "gaperon-1b"},
    "Llama 3.2 3B": {"preset": "llama3.2-3b"},
    "Llama 3.1 8B": {"preset": "llama3.1-8b"},
    "Llama 3.1 70B": {"preset": "llama3.1-70b"},
}
"""Settings of ``[model]``."""

DEVICES = {"8 × H100": ("h100", 8), "64 × MI250X dies": ("mi250x", 64)}


@dataclass(frozen=True)
class Row:
    """One layout; bf16-mixed, sequences of 4,096 tokens, 1F1B, sequence parallelism where tp > 1."""

    devices: str
    model: str
    tp: int
    pp: int
    micro_batch: int
    is_short: bool = False
    """Whether it is in the README too."""

    @property
    def device(self) -> Device:
        return load_device(DEVICES[self.devices][0])

    @property
    def world_size(self) -> int:
        return DEVICES[self.devices][1]

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp)

    def settings(self, folder: Path) -> Settings:
        recipe = folder / "recipe.toml"
        recipe.write_text("[model]\n[train]\n")
        values = {
            **{f"model.{key}": value for key, value in MODELS[self.model].items()},
            "parallel.tp": self.tp,
            "parallel.pp": self.pp,
            "train.steps": 1,
            "train.global_batch_size": 512,
            "train.micro_batch_size": self.micro_batch,
            "train.sequence_length": 4096,
            "train.precision": "bf16-mixed",
        }
        overrides = [f"{name}={value}" for name, value in values.items()]
        return load_recipe(recipe, overrides, self.world_size, needs_data=False)

    def memory(self, folder: Path) -> RankMemory:
        return fullest(memory_by_stage(self.settings(folder), self.device, self.world_size))


ROWS = [
    Row("8 × H100", "Gaperon 1B", 1, 1, 4, is_short=True),
    Row("8 × H100", "Gaperon 1B", 1, 1, 8),
    Row("8 × H100", "Llama 3.2 3B", 1, 1, 1),
    Row("8 × H100", "Llama 3.2 3B", 1, 1, 2, is_short=True),
    Row("8 × H100", "Llama 3.2 3B", 2, 1, 4),
    Row("8 × H100", "Llama 3.1 8B", 1, 1, 1),
    Row("8 × H100", "Llama 3.1 8B", 2, 1, 1, is_short=True),
    Row("8 × H100", "Llama 3.1 8B", 4, 1, 2),
    Row("8 × H100", "Llama 3.1 8B", 8, 1, 4),
    Row("8 × H100", "Llama 3.1 8B", 2, 2, 1),
    Row("8 × H100", "Llama 3.1 70B", 8, 1, 1, is_short=True),
    Row("64 × MI250X dies", "Gaperon 1B", 1, 1, 4, is_short=True),
    Row("64 × MI250X dies", "Llama 3.2 3B", 1, 1, 1),
    Row("64 × MI250X dies", "Llama 3.2 3B", 2, 1, 2, is_short=True),
    Row("64 × MI250X dies", "Llama 3.1 8B", 1, 1, 1),
    Row("64 × MI250X dies", "Llama 3.1 8B", 2, 1, 1, is_short=True),
    Row("64 × MI250X dies", "Llama 3.1 8B", 2, 2, 1),
    Row("64 × MI250X dies", "Llama 3.1 8B", 8, 1, 4),
    Row("64 × MI250X dies", "Llama 3.1 70B", 8, 1, 1),
    Row("64 × MI250X dies", "Llama 3.1 70B", 8, 4, 1),
    Row("64 × MI250X dies", "Llama 3.1 70B", 8, 8, 1, is_short=True),
]


def full_table(folder: Path) -> str:
    """Of docs/memory.md: GiB of the fullest rank by kind."""
    head = ("devices", "model", "tp", "pp", "dp", "micro batch", "parameters", "masters", "moments", "gradients")
    head += ("activations", "other", "total", "fits")
    return _markdown(head, (_full_cells(row, row.memory(folder)) for row in ROWS))


def short_table(folder: Path) -> str:
    """Of the README."""
    head = ("devices", "model", "tp × pp × dp", "micro batch", "GiB per device", "fits")
    return _markdown(head, (_short_cells(row, row.memory(folder)) for row in ROWS if row.is_short))


PAGES = {"docs/memory.md": full_table, "README.md": short_table}


def replaced(page: str, table: str) -> str:
    """The page with the table between its two marks. Raises ValueError where they are not in it."""
    before, _, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page has no {START} … {END}")
    return f"{before}{START}\n{table}{END}{after}"


def _full_cells(row: Row, memory: RankMemory) -> list[str]:
    kinds = (memory.parameters, memory.masters, memory.moments, memory.gradients, memory.activations)
    sizes = [*kinds, memory.workspace + memory.inputs, memory.total]
    layout = map(str, (row.tp, row.pp, row.dp, row.micro_batch))
    return [row.devices, row.model, *layout, *(f"{size / GIB:.1f}" for size in sizes), _fits(row, memory)]


def _short_cells(row: Row, memory: RankMemory) -> list[str]:
    layout = f"{row.tp} × {row.pp} × {row.dp}"
    return [row.devices, row.model, layout, str(row.micro_batch), f"{memory.total / GIB:.1f}", _fits(row, memory)]


def _fits(row: Row, memory: RankMemory) -> str:
    return "yes" if memory.fits(row.device) else "no"


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(folder: Path) -> None:
    for name, table in PAGES.items():
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        if START in text:
            page.write_text(replaced(text, table(folder)), encoding="utf-8")
            print(f"written: {page}")
        else:
            print(f"{page} has no {START}", file=sys.stderr)


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as temporary:
        main(Path(temporary))
