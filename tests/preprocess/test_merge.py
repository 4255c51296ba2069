"""Shards, merging, shuffling and deduplication, against naive references."""

import json
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagap.data.indexed import IndexedDataset, IndexedDatasetWriter
from megagap.data.manifest import read_manifest
from megagap.data.order import stable_key
from megagap.errors import DataError
from megagap.preprocess import arrange as arrange_module
from megagap.preprocess import preprocess
from megagap.preprocess.arrange import document_keys
from megagap.preprocess.merge import merge_datasets
from tests.launching import SECONDS
from tests.warm_start import python

Write = Callable[..., str]


def pair_files(prefix: Path | str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def origins_of(prefix: Path | str) -> bytes:
    return Path(f"{prefix}.origins").read_bytes()


@pytest.fixture
def corpora(tmp_path: Path, texts: list[str]) -> list[Path]:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, count in zip(paths, (150, 90), strict=True):
        documents = [texts[i % 4] + str(i % 60) for i in range(count)] + ["", "{"]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents) + "[]\n")
    return paths


@pytest.fixture
def made(tmp_path: Path, corpora: list[Path], tokenizer_folder: Path) -> Write:
    def make(name: str, **options: Any) -> str:
        tokenizer = str(options.pop("tokenizer", tokenizer_folder))
        options = dict(append_eod=True, on_error="skip", min_tokens=5) | options
        summary = preprocess(corpora, str(tmp_path / name), tokenizer, **options)
        return summary.pairs[0].prefix

    return make


@pytest.mark.parametrize("options", [{}, {"dedup": True}, {"shuffle_documents": 5}])
@pytest.mark.parametrize("count", [1, 3, 17])
def test_merged_shards_equal_one_run(made: Write, tmp_path: Path, count: int, options: dict[str, Any]) -> None:
    whole = made("whole", **options)
    shards = [made("shards", part=(i, count)) for i in range(count)]
    assert len({*shards}) == count
    merge_datasets(shards, str(tmp_path / "merged"), **options)
    assert pair_files(tmp_path / "merged") == pair_files(whole)
    assert origins_of(tmp_path / "merged") == origins_of(whole)
    one, other = read_manifest(tmp_path / "merged"), read_manifest(whole)
    assert one and other
    assert one.model_dump(exclude={"inputs"}) == other.model_dump(exclude={"inputs"})
    assert one.left_out.empty == 2 and one.left_out.malformed == {"not a JSON object": 2}
    assert other.documents + other.left_out.duplicate + other.left_out.short == 242
    assert not list(tmp_path.glob("*.partial*")) and not list(tmp_path.glob("*.lock"))


def test_shards_that_are_missing_or_out_of_order_are_refused(made: Write, tmp_path: Path) -> None:
    shards = [made("shards", part=(i, 3)) for i in range(3)]
    other = made("other")
    merge_datasets([other, *shards, other, *shards], str(tmp_path / "fine"))
    for wrong in (shards[:2], shards[1:], [shards[0], shards[2]], [shards[0], other], [*shards[:2], *shards]):
        with pytest.raises(DataError, match="give all shards in order"):
            merge_datasets(wrong, str(tmp_path / "merged"))
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize(("key", "count"), [("text", 1), ("id", 2)])
def test_shards_of_two_sets_are_refused(
    made: Write, tmp_path: Path, corpora: list[Path], tokenizer_folder: Path, key: str, count: int
) -> None:
    """Other inputs, other cuts, and another key."""
    for path in corpora:
        path.write_text(path.read_text().replace('{"text": ', '{"id": "some words here", "text": '))
    first = made("first", part=(0, 2))
    other = preprocess(
        corpora[:count], str(tmp_path / "other"), str(tokenizer_folder), [key], True, 1, "skip", part=(1, 2)
    )
    with pytest.raises(DataError, match="is shard 1/2 of a different set"):
        merge_datasets([first, other.pairs[0].prefix], str(tmp_path / "merged"))


def test_pairs_of_other_tokenizers_or_types_are_refused(made: Write, tmp_path: Path, bpe_of_lines: Path) -> None:
    one = made("one")
    with pytest.raises(DataError, match="tokenizer fingerprint"):
        merge_datasets([one, made("other", tokenizer=bpe_of_lines)], str(tmp_path / "merged"))
    with pytest.raises(DataError, match="append_eod"):
        merge_datasets([one, made("bare", append_eod=False)], str(tmp_path / "merged"))
    with IndexedDatasetWriter(tmp_path / "wide", "int32") as writer:
        writer.add_document([1, 2])
    with pytest.raises(DataError, match=r"of type uint16, .*wide of type int32"):
        merge_datasets([one, str(tmp_path / "wide")], str(tmp_path / "merged"))
    with pytest.raises(DataError, match="into itself"):
        merge_datasets([one], f"{tmp_path}/../{tmp_path.name}/{Path(one).name}")


def test_a_pair_that_is_merged_twice_is_reported_whatever_its_name(
    made: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = made("one")
    for ending in (".bin", ".idx", ".json"):
        (tmp_path / f"link{ending}").symlink_to(one + ending)
    for names in ([one, one], [one, f"{one}.bin"], [f"{one}.json", str(tmp_path / "link.idx")]):
        caplog.clear()
        merged = merge_datasets(names, str(tmp_path / "merged.bin"))
        assert merged.prefix == str(tmp_path / "merged")
        assert merged.document_count == 2 * IndexedDataset(one).document_count
        assert "therefore merged, more than once" in "".join(caplog.messages)
    with pytest.raises(DataError, match="into itself"):
        merge_datasets([one], str(tmp_path / "link"))


def test_pairs_made_from_the_same_text_are_reported(
    made: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = made("one"), made("other", workers=2)
    caplog.clear()
    merge_datasets([one, other], str(tmp_path / "merged"))
    assert f"{one} and {other} contain the same text, from 2 files" in "".join(caplog.messages)
    caplog.clear()
    merge_datasets([made("parts", part=(i, 2)) for i in range(2)], str(tmp_path / "parts"))
    assert not caplog.messages


def test_documents_of_several_sequences_stay_whole(tmp_path: Path) -> None:
    documents = [[[[1, 2], [3]], []], [[[4], [5, 6], []]]]
    for i, some in enumerate(documents):
        with IndexedDatasetWriter(tmp_path / str(i), "uint16") as writer:
            for document in some:
                for sequence in document:
                    writer.add_sequence(sequence)
                writer.end_document()
    merged = merge_datasets([str(tmp_path / "0"), str(tmp_path / "1")], str(tmp_path / "merged"))
    assert [sequence.tolist() for sequence in merged] == [[1, 2], [3], [4], [5, 6], []]
    assert merged.document_indices.tolist() == [0, 2, 2, 5]
    assert read_manifest(tmp_path / "merged") is None


@pytest.mark.parametrize("bucket_bytes", [300, 1 << 30])
@pytest.mark.parametrize("at_a_time", [50, 1 << 20])
def test_shuffling_and_deduplication_equal_a_naive_program(
    made: Write, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int, at_a_time: int
) -> None:
    monkeypatch.setattr(arrange_module, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(arrange_module, "DOCUMENTS_AT_A_TIME", at_a_time)
    plain = [document.tolist() for document in IndexedDataset(made("plain"))]
    first = [i for i, document in enumerate(plain) if document not in plain[:i]]
    assert len(first) < len(plain)
    assert [d.tolist() for d in IndexedDataset(made("dedup", dedup=True))] == [plain[i] for i in first]
    keys = document_keys(0, len(plain), stable_key("documents", 9)).tolist()
    shuffled = IndexedDataset(made("both", dedup=True, shuffle_documents=9))
    assert [d.tolist() for d in shuffled] == [plain[i] for i in sorted(first, key=keys.__getitem__)]
    shuffled.verify()
    again, other = (IndexedDataset(made(f"seed{seed}", shuffle_documents=seed)) for seed in (1, 2))
    assert sorted(d.tolist() for d in again) == sorted(d.tolist() for d in other) == sorted(plain)
    assert [d.tolist() for d in again] != [d.tolist() for d in other] != plain


def test_document_keys_are_splitmix64() -> None:
    """The generator's published outputs for the seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert document_keys(0, 4, 1234567).tolist() == expected
    assert document_keys(2, 2, 1234567).tolist() == expected[2:]
    assert document_keys(0, 1, 2**64 - 1).dtype == np.uint64


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_begin_of_text_ids_are_compared(
    made: Write, tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture, prepend_bos: bool
) -> None:
    """If documents have none, a different one is only a warning."""
    other = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps(settings | {"bos_token": "<|end_of_text|>"}))
    pairs = [made("one", prepend_bos=prepend_bos), made("other", tokenizer=other, prepend_bos=prepend_bos)]
    caplog.clear()
    if prepend_bos:
        with pytest.raises(DataError, match=r"have the begin-of-text id 1 of(.|\n)*of .*one_text_document is 0"):
            merge_datasets(pairs, str(tmp_path / "merged"))
    else:
        merge_datasets(pairs, str(tmp_path / "merged"))
        assert "the begin-of-text id 1" in caplog.text


def test_tokenizers_with_the_same_tokens_that_split_texts_differently_are_reported(
    made: Write, tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    state = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(state | {"normalizer": {"type": "Lowercase"}}))
    pairs = [made("one"), made("other", tokenizer=other)]
    caplog.clear()
    merge_datasets(pairs, str(tmp_path / "merged"))
    assert "have the same tokens, but whose settings differ" in caplog.text


@pytest.mark.parametrize(
    "options", [[], ["--shuffle-documents", "3"], ["--dedup", "exact"]], ids=lambda o: "".join(o[:1])
)
@pytest.mark.parametrize("limit", [10, 700, 3_000])
def test_a_full_disk_leaves_what_was_there(made: Write, tmp_path: Path, limit: int, options: list[str]) -> None:
    """By a limit on the size of files, which the system refuses with EFBIG."""
    one = made("one")
    assert Path(f"{one}.bin").stat().st_size > limit
    for ending in (".bin", ".idx", ".json"):
        (tmp_path / f"merged{ending}").write_text("old")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    tool = Path(__file__).parents[2] / "tools/merge_datasets.py"
    command = [python(), str(tool), "--input", one, one, "--output-prefix", str(tmp_path / "merged"), *options]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, timeout=SECONDS)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "File too large" in done.stderr and str(tmp_path / "merged") in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
