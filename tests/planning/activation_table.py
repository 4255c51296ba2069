"""Activation memory of real processes beside the formula, for combinations of what changes it.

    python -m tests.planning.activation_table                       # measures all, writes docs/memory.md: some minutes
    python -m tests.planning.activation_table --only zb-v "cp 2"    # prints rows whose names have all of these

In each row are one layout and schedule, in each column a mode of recomputation. A measurement is the most that a rank
holds within a step beyond parameters, gradients and the optimizer's state, as ``measured.py`` takes it, of the rank
that holds most; the deviation is that of the rank where the formula is furthest off.
"""

import argparse
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.planning.measured import Compared, compare, settings_of
from tests.workers import Workers

PAGE = Path(__file__).parents[2] / "docs/memory.md"
START, END = "<!-- activations: python -m tests.planning.activation_table -->", "<!-- end of the activations -->"

BASE: dict[str, Any] = {
    "model": {
        "preset": "tiny",
        "hidden_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 176,
        "vocab_size": 512,
    },
    "train": {"steps": 10, "global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 512},
}
"""Few parameters, so that activations are most of the memory and little is computed."""

RECOMPUTE = ("none", "selective", "full")

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp 2": {"parallel.tp": 2, "parallel.sequence_parallel": False},
    "tp 2, sequence parallel": {"parallel.tp": 2},
    "cp 2, ring": {"parallel.cp": 2, "parallel.context_mode": "ring"},
    "cp 2, alltoall": {"parallel.cp": 2, "parallel.context_mode": "alltoall"},
    "cp 2, allgather": {"parallel.cp": 2, "parallel.context_mode": "allgather"},
    **{f"dp 2, zero {stage}": {"optim.zero": stage, "train.global_batch_size": 32} for stage in range(4)},
}
"""With two pipeline ranks besides."""

WITHOUT_PIPELINE: dict[str, dict[str, Any]] = {
    f"{one}, {other}": {**LAYOUTS[one], **LAYOUTS[other]}
    for one in ("tp 2", "tp 2, sequence parallel")
    for other in ("cp 2, ring", "cp 2, alltoall", "cp 2, allgather")
}


@dataclass(frozen=True)
class Row:
    layout: str
    schedule: str
    changes: dict[str, Any]

    def changes_with(self, recompute: str) -> dict[str, Any]:
        return {"train.recompute": recompute, **self.changes}


RANKS = 4


def row_of(layout: str, schedule: str) -> Row:
    """``schedule`` is left out where the layout has no pipeline."""
    if layout in WITHOUT_PIPELINE:
        return Row(layout, "–", WITHOUT_PIPELINE[layout])
    pipeline = {"parallel.pp": 2, "parallel.schedule": schedule}
    return Row(f"pp 2, {layout}", schedule, {**pipeline, **LAYOUTS[layout]})


def rows() -> list[Row]:
    with_pipeline = [row_of(layout, schedule) for layout in LAYOUTS for schedule in SCHEDULES]
    return with_pipeline + [row_of(layout, "") for layout in WITHOUT_PIPELINE]


def measured(workers: Workers, row: Row, recompute: str, more: dict[str, Any] | None = None) -> list[Compared]:
    """Every rank of a cell. ``more``: settings that change it."""
    with TemporaryDirectory() as folder:
        changes = row.changes_with(recompute) | (more or {})
        settings = settings_of(Path(folder), RANKS, changes, BASE)
    return compare(workers, settings, RANKS)


def cell(ranks: list[Compared]) -> str:
    most = max(rank.measured.activations for rank in ranks)
    furthest = max((rank.activations for rank in ranks), key=lambda ratio: abs(ratio - 1))
    return f"{most / 2**20:.1f} ({furthest - 1:+.1%})".replace("-", "−").replace("%", " %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="parts of names; nothing is written")
    options = parser.parse_args()
    lines = [f"| layout | schedule | {' | '.join(RECOMPUTE)} |", "| --- | --- |" + " --- |" * len(RECOMPUTE)]
    worst: list[Compared] = []
    workers = Workers()
    for row in rows():
        if not all(part in f"{row.layout}, {row.schedule}" for part in options.only):
            continue
        cells = [measured(workers, row, recompute) for recompute in RECOMPUTE]
        worst += [rank for ranks in cells for rank in ranks]
        lines.append(f"| {row.layout} | {row.schedule} | {' | '.join(map(cell, cells))} |")
        print(lines[-1], flush=True)
    workers.close()
    off = max(abs(rank.activations - 1) for rank in worst)
    total = max(abs(rank.total - 1) for rank in worst)
    summary = f"Measured on {date.today():%Y-%m-%d}: activations at most {off:.1%} off, totals {total:.1%}."
    summary = summary.replace("%", " %")
    print(summary)
    if not options.only:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{START}\n{summary}\n\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
