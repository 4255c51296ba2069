"""What is kept of a bad step."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megagap.data.samples import Sample
from megagap.observe.evidence import Evidence, Reason, by_source, ranges, reason_of, save_batch


@dataclass
class Run:
    path: Path
    is_writer: bool = True


def numbers(**changes):
    good = {"loss": [2.0], "grad_norm": [1.0], "spike": [0.0], "differing": [], "loss_scale": []}
    return good | {name: [value] for name, value in changes.items()}


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (numbers(), None),
        (numbers(loss=float("nan")), Reason.NOT_FINITE),
        (numbers(grad_norm=float("inf"), differing=1.0), Reason.NOT_FINITE),
        (numbers(grad_norm=float("inf"), loss_scale=2.0), Reason.OVERFLOW),
        (numbers(loss=float("nan"), loss_scale=2.0), Reason.NOT_FINITE),
        (numbers(grad_norm=float("inf"), loss_scale=1.0), Reason.NOT_FINITE),
        (numbers(grad_norm=float("inf"), loss_scale=2.0, differing=1.0), Reason.NOT_FINITE),
        (numbers(grad_norm=0.0), Reason.NO_GRADIENT),
        (numbers(grad_norm=0.0, loss=0.0), None),
        (numbers(differing=1.0, spike=1.0), Reason.NOT_REPEATED),
        (numbers(spike=1.0), Reason.SPIKE),
    ],
)
def test_a_step_has_the_first_reason_that_holds(found, reason):
    assert reason_of(found) is reason


@pytest.mark.parametrize(
    ("norms", "largest"),
    [
        ([], (None, None)),
        ([1.0, 3.0, 2.0], ("b", 3.0)),
        ([np.nan, np.inf, 2.0], ("b", None)),  # a backward pass carries it from the later to the earlier
    ],
)
def test_the_layer_is_the_one_with_the_largest_gradient_or_where_the_first_was_not_finite(tmp_path, norms, largest):
    assert Evidence(Run(tmp_path), None, ["a", "b", "c"])._largest(norms) == largest


def test_samples_are_written_as_the_setting_that_skips_them():
    assert ranges([4, 5, 6, 9, 10, 20]) == ["4:7", "9:11", "20:21"] and ranges([]) == []


def test_documents_and_files_are_listed_by_source_and_the_batch_can_be_read_again(tmp_path):
    tokens = np.arange(4)
    samples = [
        Sample(7, "fr", [3, 4], tokens, ["x"]),
        Sample(8, "en", [1], tokens + 1, ["y"]),
        Sample(9, "fr", [2, 3], tokens, ["w"]),
    ]
    assert by_source(samples) == [
        {"source": "fr", "files": ["w", "x"], "documents": [2, 3, 4]},
        {"source": "en", "files": ["y"], "documents": [1]},
    ]
    save_batch(tmp_path / "guard/step.npz", samples)
    batch = np.load(tmp_path / "guard/step.npz")
    assert batch["tokens"].dtype == np.uint32 and np.array_equal(batch["tokens"][1], tokens + 1)
    assert batch["samples"].tolist() == [7, 8, 9] and batch["sources"].tolist() == ["fr", "en", "fr"]
