"""Megatron's own class reads our files and we read its; if it is not installed, a naive reader replaces it.

To try with it: ``pip install --no-deps --target DIR megatron-core`` and ``PYTHONPATH=DIR``.
"""

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagap.data.indexed import IndexedDataset
from megagap.preprocess import preprocess

DTYPES = {4: "<i4", 8: "<u2"}


def read_naively(prefix: Path) -> tuple[list[list[int]], list[int]]:
    """The sequences and document indices, field by field, from the format's description."""
    index, tokens = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack("<QBQQ", index[9:34])
    assert version == 1
    values = struct.unpack(f"<{sequences}i{sequences}q{documents}q", index[34:])
    lengths, pointers = values[:sequences], values[sequences : 2 * sequences]
    dtype = np.dtype(DTYPES[code])
    read = [
        np.frombuffer(tokens[start : start + length * dtype.itemsize], dtype).tolist()
        for length, start in zip(lengths, pointers, strict=True)
    ]
    return read, list(values[2 * sequences :])


@pytest.fixture(params=["uint16", "int32"])
def ours(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    corpus: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A pair that preprocessing wrote."""
    from megagap.preprocess import encoder, job

    for module in (encoder, job):
        monkeypatch.setattr(module, "best_dtype", lambda size: np.dtype(request.param).newbyteorder("<"))
    preprocess([corpus], str(tmp_path / "ours"), str(tokenizer_folder), append_eod=True)
    return tmp_path / "ours_text_document"


def plain(sequences: Sequence[Any]) -> list[list[int]]:
    return [sequence.tolist() for sequence in sequences]


def test_a_naive_reader_reads_ours(ours: Path) -> None:
    dataset = IndexedDataset(ours)
    assert read_naively(ours) == (plain(dataset), dataset.document_indices.tolist())
    assert len(dataset) == dataset.document_count == 200


@pytest.fixture
def megatron() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")


def test_megatron_reads_ours(ours: Path, megatron: Any) -> None:
    theirs, dataset = megatron.IndexedDataset(str(ours)), IndexedDataset(ours)
    assert plain([theirs[i] for i in range(len(theirs))]) == plain(dataset)
    assert theirs.document_indices.tolist() == dataset.document_indices.tolist()
    assert theirs.index.dtype == dataset.dtype


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_we_read_megatrons(tmp_path: Path, megatron: Any, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    documents = [[[1, 2, 3], [4]], [[500]], [[60_000, 0]]]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    dataset = IndexedDataset(tmp_path / "theirs")
    assert dataset.dtype.name == dtype
    assert [plain(dataset[s:e]) for s, e in pairwise(dataset.document_indices)] == documents
    dataset.verify(65_000)
