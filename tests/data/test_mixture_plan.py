"""The plan of what a run will read, against what it reads."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megagap.data.mixture_plan import draw_mixture_plan, mixture_plan, mixture_plan_table, unnormalised_weights
from megagap.data.samples import TrainingData
from megagap.errors import DataError
from megagap.timeline import Source
from tests.few import phase, timeline


def in_phases(sources: list[Source], steps: int, skip: list[tuple[int, int]] | None = None) -> TrainingData:
    en, fr, code = sources
    phases = [phase("first", 48, 4, (en, fr)), phase("second", 24, 8, (fr, code)), phase("last", 12, 4, (en,))]
    return TrainingData(timeline(*phases, batch=12, steps=steps), seed=1, skip=skip or [])


@pytest.mark.parametrize("steps", [2, 6, 7])
@pytest.mark.parametrize("skip", [[], [(3, 9), (50, 55)]])
def test_the_plan_equals_what_is_read(sources: list[Source], steps: int, skip: list[tuple[int, int]]) -> None:
    data = in_phases(sources, steps, skip)
    planned = mixture_plan(data)
    read = [(data.sample(n).source, len(data.tokens(n)) - 1) for n in range(12 * steps)]
    for part in planned["phases"]:
        within = read[12 * (part["first_step"] - 1) : 12 * part["last_step"]]
        counted = Counter(name for name, _ in within)
        assert part["tokens"] == sum(length for _, length in within)
        assert {source["source"]: source["samples"] for source in part["sources"]} == {
            source["source"]: counted[source["source"]] for source in part["sources"]
        }
        assert {length for _, length in within} == {part["sequence_length"]}
        assert sum(source["share"] for source in part["sources"]) == pytest.approx(1)
    sizes = {"en": 140, "fr": 85, "code": 66}
    for source in planned["sources"]:
        tokens = sum(length for name, length in read if name == source["source"])
        assert source["tokens"] == tokens and source["size"] == sizes[source["source"]]
        assert source["epochs"] == pytest.approx(tokens / (sizes[source["source"]] - 1))
    assert planned["phases"][-1]["last_step"] == steps


def test_the_table_and_the_picture_show_every_phase_and_source(sources: list[Source], tmp_path: Path) -> None:
    planned = mixture_plan(in_phases(sources, 7))
    console = Console(record=True, width=140)
    console.print(mixture_plan_table(planned))
    text = console.export_text()
    for word in ("first", "second", "last", "en", "fr", "code", "1 to 4", "62.50%", "37.50%"):
        assert word in text
    draw_mixture_plan(planned, tmp_path / "new/plan.png")
    assert (tmp_path / "new/plan.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.png"]
    with pytest.raises(DataError, match="cannot create the folder"):
        draw_mixture_plan(planned, tmp_path / "new/plan.png/plan.png")


@pytest.mark.parametrize(
    ("weights", "seems_wrong"),
    [
        ([0.5, 0.3, 0.2], False),
        ([0.5, 0.3, 0.2004], False),
        ([0.5, 0.3, 0.21], True),
        ([0.5, 0.3, 20.0], True),  # one was left in percent
        ([0.1, 0.1, 0.1], True),
        ([3, 2, 1], False),
        ([1, 1, 1], False),
        ([50, 30, 20], False),
    ],
)
def test_weights_that_look_like_shares_and_do_not_add_up_are_shown(
    sources: list[Source], weights: list[float], seems_wrong: bool
) -> None:
    weighted = tuple(replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True))
    complaint = unnormalised_weights(phase("web", 1, 4, weighted))
    assert bool(complaint) == seems_wrong
    if seems_wrong:
        assert "phase web" in complaint
        for source in weighted:
            (line,) = [line for line in complaint.splitlines() if line.startswith(f"  {source.name} ")]
            assert f"{source.weight / sum(weights):.4f}" in line
