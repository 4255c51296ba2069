"""What is read more than once by accident: pairs and texts that several sources have in common."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from megagap.data.agreement import require_agreement
from megagap.data.sources import shared_pairs
from megagap.preprocess import preprocess
from megagap.timeline import Source
from tests.few import WriteTokens


def test_sources_that_read_the_same_pair_are_reported_whatever_its_name(
    tmp_path: Path, write_tokens: WriteTokens
) -> None:
    one, other = write_tokens("one", [[1, 2]]), write_tokens("other", [[3, 4]])
    for ending in (".bin", ".idx"):
        (tmp_path / f"link{ending}").symlink_to(one + ending)
        shutil.copy(one + ending, tmp_path / f"copy{ending}")
    names = (
        ("a", (one,)),
        ("b", (other, str(tmp_path / "link"))),
        ("c", (str(tmp_path / "copy"),)),
        ("d", (f"{one}.bin",)),
    )
    told = shared_pairs([Source(*name) for name in names])
    assert [text.split(";")[0] for text in told] == [
        f"sources a and b read the same files: {tmp_path / 'link'}",
        f"sources a and d read the same files: {one}.bin",
    ]
    assert shared_pairs([Source("a", (one,)), Source("b", (other,)), Source("c", ("absent",))]) == []


def test_sources_made_from_the_same_text_are_reported(tmp_path: Path, tokenizer_folder: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "the same"}\n')
    (tmp_path / "third.jsonl").write_text('{"text": "another"}\n')
    prefixes = {
        name: [preprocess([tmp_path / f"{name}.jsonl"], str(tmp_path / name), str(tokenizer_folder)).pairs[0].prefix]
        for name in ("one", "other", "third")
    }
    _, (warning,) = require_agreement(prefixes, "", 300)
    assert f"{prefixes['one'][0]} and {prefixes['other'][0]} contain the same text, from 1 file" in warning


def test_training_warns_of_a_pair_under_two_names(
    tmp_path: Path, write_tokens: WriteTokens, caplog: pytest.LogCaptureFixture
) -> None:
    from megagap.config import load_recipe
    from megagap.training.datasets import training_data
    from tests.recipes import write_recipe

    prefix = write_tokens("one", [[1, 2, 3] * 200])
    twice: list[dict[str, Any]] = [{"path": prefix, "name": name, "weight": 0.5} for name in ("web", "more")]
    with caplog.at_level(logging.WARNING):
        training_data(load_recipe(write_recipe(tmp_path, data={"sources": twice}), []))
    assert f"sources web and more read the same files: {prefix}" in caplog.text
