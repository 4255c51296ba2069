"""Held-out samples."""

from pathlib import Path

import pytest

from megagap.data.validation import open_validation
from megagap.errors import DataError
from megagap.timeline import Source
from tests.few import S, WriteTokens, numbered


def test_validation_is_spread_evenly_over_the_held_out_documents(sources: list[Source]) -> None:
    validation = open_validation(sources, [], S, samples=3, split="50,50,0")
    assert list(validation.windows) == ["en", "fr", "code"]
    # en: 10 documents of 7 tokens from 70 on, that is 17 windows.
    assert validation.windows["en"].tolist() == [0, 5, 11]
    assert validation.batch("en", 0, 3)[:, 0].tolist() == [70, 90, 114]
    assert validation.batch("en", 3, 2).shape == (0, S + 1)


def test_explicit_validation_uses_whole_files(sources: list[Source]) -> None:
    validation = open_validation(sources[:1], sources[2:], S, samples=1000, split="50,50,0")
    assert {name: len(windows) for name, windows in validation.windows.items()} == {"code": 16}
    assert validation.batch("code", 0, 16)[:, 0].tolist() == list(range(2000, 2064, 4))


def test_validation_on_training_data_is_reported(
    sources: list[Source], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_validation(sources[:1], sources[2:], S, samples=10)
    assert not caplog.messages
    for ending in (".bin", ".idx"):
        (tmp_path / f"link{ending}").symlink_to(f"{sources[0].prefixes[0]}{ending}")
    open_validation(sources[:1], [Source("held", (str(tmp_path / "link"),))], S, samples=10)
    (message,) = caplog.messages
    assert "validation source held is trained on too" in message and "/link (the same files as " in message


def test_a_validation_set_that_is_rebuilt_during_the_run_is_refused(
    sources: list[Source], write_tokens: WriteTokens
) -> None:
    validation = open_validation([], sources[2:], S, samples=3)
    write_tokens("code", numbered(5, 11, 2000))
    with pytest.raises(DataError, match="source code was rebuilt while the run reads it"):
        validation.batch("code", 0, 3)


def test_no_held_out_share_means_no_validation(sources: list[Source]) -> None:
    assert open_validation(sources, [], S, samples=10).windows == {}
