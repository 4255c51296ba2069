"""Counts and times of each block, from the statistics that datatrove's tasks leave, and examples of documents."""

import gzip
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats

from megagap.errors import DataError, library_errors

EXAMPLES = 3
"""Of each kind that are shown."""

TITLES = {
    "Corpus": "read",
    "Url-filter": "urls",
    "Language": "language",
    "Gopher Repetition": "repetition",
    "Gopher Quality": "gopher",
    "FineWeb Quality": "fineweb",
    "MinHash stage 4": "deduplicate",
    "PII": "mask",
    "N-grams decontaminate": "decontaminate",
    "Quality classifier": "classifier",
}
"""Names of blocks, or parts of them, and what a stage is called in the settings."""


@dataclass
class Count:
    stage: str
    total: int
    kept: int
    dropped: int
    reasons: dict[str, int] = field(default_factory=dict)
    details: dict[str, int] = field(default_factory=dict)
    """Other counts of the block, such as what was masked."""
    seconds: float = 0.0
    """That the block's tasks took by the clock, so that a busy machine shows; of a whole stage there is CPU time."""

    @property
    def per_second(self) -> float | None:
        """Documents per second of one task."""
        return self.total / self.seconds if self.seconds else None


class CpuTime(PipelineStep):
    """Counts the milliseconds of CPU that a task takes, all threads together: ``[timer.start, …, timer]``."""

    name = "CPU time"
    type = "⏱️ - TIME"

    def __init__(self) -> None:
        super().__init__()
        self._begin = 0.0

    def start(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        self._begin = time.process_time()
        return data

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        yield from data or ()
        self.stat_update("milliseconds", value=round(1000 * (time.process_time() - self._begin)), unit="task")


def count_stages(output: Path) -> list[Count]:
    """Of the stages that keep or drop documents, in their order. Raises :class:`DataError` if there are none."""
    counts = []
    for stage in ("filter", "select"):
        for block in _blocks(output / "logs" / stage / "stats"):
            title = next((name for part, name in TITLES.items() if part in block["name"]), None)
            if title:
                counts.append(_count(title, block))
    if not counts:
        raise DataError(f"{output} has no statistics of a curation\n  give the output folder of megagap curate run.")
    return counts


def require_balance(output: Path, counts: Sequence[Count]) -> None:
    """Raises :class:`DataError` unless what each stage kept is what the next one was given, and the last one's is
    what ``curated/`` and the token files have."""
    given = [(count.stage, count.total) for count in counts[1:]]
    given.append(("curated", _sum(output, "select", "💽", "total")))
    if tokens := [folder.name for folder in (output / "logs").glob("tokens-*")]:
        given.append(("token files", sum(_sum(output, name, "🔢", "documents") for name in tokens)))
    kept = [count.kept for count in counts] + [counts[-1].kept]
    for (stage, total), expected in zip(given, kept, strict=False):
        if total != expected:
            raise DataError(
                f"{stage} was given {total:,} documents of the {expected:,} that were kept before it: files in "
                f"{output} were changed meanwhile\n  choose another output.folder, or remove it, and run again."
            )


def _sum(output: Path, stage: str, kind: str, name: str) -> int:
    """Of the statistic ``name`` of a stage's blocks whose type starts with ``kind``."""
    blocks = [block for block in _blocks(output / "logs" / stage / "stats") if block["name"].startswith(kind)]
    return sum(_number(block["stats"].get(name, 0)) for block in blocks)


def stage_seconds(output: Path) -> dict[str, float]:
    """CPU seconds of each stage's tasks, as far as they are complete."""
    found = {}
    for folder in sorted((output / "logs").iterdir()):
        blocks = [block for block in _blocks(folder / "stats") if CpuTime.name in block["name"]]
        if blocks:
            found[folder.name] = sum(_number(block["stats"].get("milliseconds", 0)) for block in blocks) / 1000
    return found


def _blocks(folder: Path) -> list[Any]:
    """Of one pipeline, each summed over its tasks."""
    total = PipelineStats()
    for path in sorted(folder.glob("*.json")):
        with library_errors(f"cannot read {path}"):
            total += PipelineStats.from_json(json.loads(path.read_text(encoding="utf-8")))
    blocks: list[Any] = json.loads(total.to_json())
    return blocks


def _count(title: str, block: Any) -> Count:
    stats = {key: _number(value) for key, value in block["stats"].items()}
    total = stats.pop("total", 0)
    dropped = stats.pop("dropped", 0)
    stats.pop("forwarded", None)
    reasons = {key.removeprefix("dropped_"): stats.pop(key) for key in sorted(stats) if key.startswith("dropped_")}
    details = {
        key: value for key, value in sorted(stats.items()) if key not in ("doc_len", "doc_len_tokens", "batches")
    }
    return Count(title, total, total - dropped, dropped, reasons, details, round(_seconds(block), 3))


def _number(value: Any) -> int:
    return int(value["total"] if isinstance(value, dict) else value)


def _seconds(block: Any) -> float:
    time = block.get("time_stats") or 0
    return float(time["total"] if isinstance(time, dict) else time)


def documents(folder: Path) -> Iterator[dict[str, Any]]:
    """Of the JSON lines that datatrove wrote to ``folder`` and below it, in the order of the files' names."""
    for path in sorted(folder.rglob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)


def as_json(counts: list[Count]) -> list[dict[str, Any]]:
    return [{**asdict(count), "documents_per_second": count.per_second} for count in counts]
