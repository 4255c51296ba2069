import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagap.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
from megagap.errors import DataError

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def reference_index(documents: list[list[list[int]]], code: int, itemsize: int) -> bytes:
    """The .idx of documents of sequences, packed field by field."""
    lengths = [len(sequence) for document in documents for sequence in document]
    pointers = [itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    ends = [sum(len(d) for d in documents[:i]) for i in range(len(documents) + 1)]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(ends))
    return index + struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(ends)}q", *lengths, *pointers, *ends)


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            for sequence in document:
                writer.add_sequence(sequence)
            writer.end_document()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 127), max_size=9), max_size=3), max_size=8),
    st.sampled_from(sorted(CODES)),
)
def test_files_are_megatrons_bytes_and_read_back_equal(documents: list[list[list[int]]], dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        write(prefix, documents, dtype)
        assert sorted(os.listdir(folder)) == ["data.bin", "data.idx"]
        sequences = [sequence for document in documents for sequence in document]
        kind = np.dtype(dtype)
        assert (prefix.with_suffix(".idx")).read_bytes() == reference_index(documents, CODES[dtype], kind.itemsize)
        assert (prefix.with_suffix(".bin")).read_bytes() == np.array(sum(sequences, []), kind).tobytes()

        dataset = IndexedDataset(prefix)
        assert [sequence.tolist() for sequence in dataset] == sequences
        assert len(dataset) == len(sequences)
        assert dataset.dtype == kind
        assert dataset.tokens.tolist() == sum(sequences, [])
        assert [dataset.document(i).tolist() for i in range(dataset.document_count)] == [sum(d, []) for d in documents]
        dataset.verify(vocab_size=128)


def test_items_are_views_that_index_like_a_list(tmp_path: Path) -> None:
    write(tmp_path / "data", [[[1, 2]], [[3]], [[4, 5, 6]]])
    dataset = IndexedDataset(tmp_path / "data")
    assert np.shares_memory(dataset[0], dataset.tokens)
    assert not dataset[0].flags.writeable
    assert dataset[-1].tolist() == [4, 5, 6]
    assert [item.tolist() for item in dataset[1:]] == [[3], [4, 5, 6]]
    with pytest.raises(IndexError):
        dataset[3]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any), st.data())
def test_sequences_between_are_those_with_a_token_there(lengths: list[int], data: st.DataObject) -> None:
    owners = [i for i, length in enumerate(lengths) for _ in range(length)]
    start = data.draw(st.integers(0, len(owners) - 1))
    stop = data.draw(st.integers(start + 1, len(owners)))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "data", [[[0] * length] for length in lengths])
        found = IndexedDataset(Path(folder) / "data").sequences_between(start, stop)
    assert found == sorted(set(owners[start:stop]))


@pytest.mark.parametrize(("vocabulary", "name"), [(65_499, "uint16"), (65_500, "int32"), (128_256, "int32")])
def test_small_vocabularies_take_two_bytes_per_token(vocabulary: int, name: str) -> None:
    assert best_dtype(vocabulary).name == name


def test_truncated_bin_names_file_and_sizes(tmp_path: Path) -> None:
    write(tmp_path / "fr", [[[1] * 600]])
    os.truncate(tmp_path / "fr.bin", 1000)
    with pytest.raises(DataError, match=r"fr\.bin is 1,000 bytes, its \.idx promises 1,200\n.*cut short"):
        IndexedDataset(tmp_path / "fr")


def test_oversized_bin_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "fr", [[[1, 2]]])
    with open(tmp_path / "fr.bin", "ab") as file:
        file.write(b"xy")
    with pytest.raises(DataError, match=r"is 6 bytes, its \.idx promises 4\n.*do not belong together"):
        IndexedDataset(tmp_path / "fr")


@pytest.mark.parametrize("size", [0, 10, 33, 34, 50, 61])
def test_index_cut_anywhere_is_refused(tmp_path: Path, size: int) -> None:
    write(tmp_path / "fr", [[[1, 2]]])
    os.truncate(tmp_path / "fr.idx", size)
    with pytest.raises(DataError, match=rf"fr\.idx is {size} bytes"):
        IndexedDataset(tmp_path / "fr")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"TNTIDX", "is not a token index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x09", "unknown dtype code 9"),
        (18, struct.pack("<Q", 2**63), "header promises"),
        (26, struct.pack("<Q", 2), "header promises"),
        (38, struct.pack("<i", -1), r"\.bin is 8 bytes, its \.idx promises 2"),
        (42, struct.pack("<q", 4), "sequence 0 has length 2 and starts at byte 4"),
        (42, struct.pack("<q", -4), "sequence 0 has length 2 and starts at byte -4"),
        (58, struct.pack("<q", 1), "document indices should run from 0 to 2"),
        (74, struct.pack("<q", 1), "document indices should run from 0 to 2"),
        (66, struct.pack("<q", 3), "document 1 has no end"),
    ],
)
def test_damaged_index_is_refused_by_opening_or_verifying(
    tmp_path: Path, offset: int, value: bytes, message: str
) -> None:
    write(tmp_path / "fr", [[[1, 2]], [[3, 4]]])
    index = bytearray((tmp_path / "fr.idx").read_bytes())
    index[offset : offset + len(value)] = value
    (tmp_path / "fr.idx").write_bytes(index)
    with pytest.raises(DataError, match=rf"{tmp_path}/fr[^\n]*{message}"):
        IndexedDataset(tmp_path / "fr").verify()


def test_negative_length_is_refused_even_if_pointers_agree_with_it(tmp_path: Path) -> None:
    write(tmp_path / "fr", [[[1, 2]], [[3, 4]], [[5, 6]]])
    index = bytearray((tmp_path / "fr.idx").read_bytes())
    struct.pack_into("<3i3q", index, 34, 2, -1, 5, 0, 4, 2)
    (tmp_path / "fr.idx").write_bytes(index)
    with pytest.raises(DataError, match="sequence 1 has length -1"):
        IndexedDataset(tmp_path / "fr").verify()


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_half_a_pair_names_the_missing_half(tmp_path: Path, ending: str) -> None:
    write(tmp_path / "fr", [[[1]]])
    (tmp_path / f"fr{ending}").unlink()
    with pytest.raises(DataError, match=rf"fr\{ending} does not exist\n.*pair is incomplete"):
        IndexedDataset(tmp_path / "fr")


def test_verify_finds_a_token_outside_the_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "fr", [[[1, 2]], [[3, 99, 4]]])
    with pytest.raises(DataError, match="token id 99 in document 1 at position 1"):
        IndexedDataset(tmp_path / "fr").verify(vocab_size=50)


@pytest.mark.parametrize("token", [65_536, -1, 1.5, "a", 2**80])
def test_writer_refuses_tokens_that_do_not_fit(tmp_path: Path, token: object) -> None:
    with (
        pytest.raises(DataError, match="does not fit uint16"),
        IndexedDatasetWriter(tmp_path / "fr", "uint16") as writer,
    ):
        writer.add_document([1, 2])
        writer.add_document(np.array([token]))
    assert list(tmp_path.iterdir()) == []


def test_no_final_name_exists_until_complete(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "fr", "uint16") as writer:
        writer.add_document([1] * 10)
        assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.idx"))
    assert len(IndexedDataset(tmp_path / "fr")) == 1


def test_failed_writing_leaves_the_old_pair_unchanged(tmp_path: Path) -> None:
    write(tmp_path / "fr", [[[1, 2, 3]]])
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "fr", "uint16") as writer:
        writer.add_document([9])
        raise RuntimeError
    assert IndexedDataset(tmp_path / "fr")[0].tolist() == [1, 2, 3]
    assert sorted(os.listdir(tmp_path)) == ["fr.bin", "fr.idx"]


@pytest.mark.parametrize("ending", ["", ".bin", ".idx", ".json", ".origins"])
def test_a_pair_may_be_given_by_one_of_its_files(tmp_path: Path, ending: str) -> None:
    for prefix in ("a", "a.bin"):  # which may end like a file
        with IndexedDatasetWriter(tmp_path / prefix, "uint16") as writer:
            writer.add_document([len(prefix)])
        dataset = IndexedDataset(f"{tmp_path / prefix}{ending}")
        assert dataset.prefix == str(tmp_path / prefix) and dataset[0].tolist() == [len(prefix)]
    with pytest.raises(DataError, match=r"absent\.idx does not exist"):
        IndexedDataset(f"{tmp_path}/absent{ending}")
    with pytest.raises(DataError, match="is a folder: give the prefix"):
        IndexedDataset(tmp_path)
