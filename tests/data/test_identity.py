"""Data sets that are rebuilt: how that is detected, and when."""

import json
import os
import shutil
from concurrent.futures import wait
from pathlib import Path

import pytest

from megagap.data.identity import differences, identify
from megagap.data.loader import MicrobatchLoader
from megagap.errors import DataError
from megagap.timeline import Source
from tests.few import WriteTokens, numbered, training


def test_a_rebuilt_pair_differs_in_what_changed(write_tokens: WriteTokens) -> None:
    prefix = write_tokens("x", numbered(9))
    before = identify(prefix)
    assert differences(before, identify(prefix)) == []
    write_tokens("x", numbered(10))
    told = differences(before, identify(prefix))
    assert "documents was 9, is 10" in told and "tokens was 63, is 70" in told
    write_tokens("x", numbered(9, first=1))
    assert [text.partition(" was ")[0] for text in differences(before, identify(prefix))] == [
        "checksum of sampled blocks"
    ]


def test_a_change_outside_the_sampled_blocks_is_detected_by_manifests(
    write_tokens: WriteTokens, tmp_path: Path
) -> None:
    prefix = write_tokens("x", numbered(60, 1000))
    manifest = Path(f"{prefix}.json")

    def state(checksum: str) -> None:
        manifest.write_text(json.dumps({"files": {".bin": {"checksum": checksum}, ".idx": {"checksum": "b"}}}))

    without = identify(prefix)
    state("a")
    with_one = identify(prefix)
    assert differences(without, with_one) == differences(with_one, without) == []
    state("c")
    (told,) = differences(with_one, identify(prefix))
    assert told.startswith("checksums of the whole files was ['a', 'b'], is ['c', 'b']")
    manifest.write_text("[")
    assert differences(with_one, identify(prefix)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_is_rebuilt_while_it_is_read_is_refused_naming_it(
    write_tokens: WriteTokens, sources: list[Source], workers: int
) -> None:
    with MicrobatchLoader(training(sources, 1, batch=12), 3, workers=workers) as loader:
        loader.step(1)
        wait(loader._ahead.values())  # a worker would look while only one of the two files is there
        write_tokens("en", numbered(21))
        with pytest.raises(DataError, match=r"source en was rebuilt while the run reads it: .*documents was 20, is 21"):
            for step in range(1, 4):
                loader.step(step + 1)


def test_a_source_whose_files_are_being_replaced_is_named(sources: list[Source]) -> None:
    loader = MicrobatchLoader(training(sources, 1, batch=12), 3)
    loader.step(1)
    os.unlink(sources[0].prefixes[0] + ".idx")
    with pytest.raises(DataError, match=r"source en was changed while the run reads it: .*en\.idx does not exist"):
        loader.step(2)


def test_files_that_are_truncated_in_place_are_refused_before_they_are_read(sources: list[Source]) -> None:
    """Reading beyond the end of a mapped file would kill the process without a message."""
    loader = MicrobatchLoader(training(sources, 1, batch=12), 3)
    loader.step(1)
    for ending in (".bin", ".idx"):
        os.truncate(sources[0].prefixes[0] + ending, 0)
    with pytest.raises(DataError, match=r"en.idx is 0 bytes"):
        loader.step(2)


def test_a_copy_with_the_same_content_is_the_same_data(sources: list[Source]) -> None:
    loader = MicrobatchLoader(training(sources, 1, batch=12), 3)
    loader.step(1)
    (prefix,) = sources[0].prefixes
    for ending in (".bin", ".idx"):
        shutil.copy(prefix + ending, prefix + ".copy")
        os.replace(prefix + ".copy", prefix + ending)
    loader.step(2)


def test_files_that_vanish_while_they_are_read_are_named(sources: list[Source]) -> None:
    loader = MicrobatchLoader(training(sources, 1, batch=12), 3)
    os.unlink(sources[0].prefixes[0] + ".bin")
    with pytest.raises(DataError, match=r"en.bin does not exist"):
        loader.step(1)
