"""Sources against the documents they were written from."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagap.data.indexed import HEADER, MAGIC, VERSION, IndexedDatasetWriter
from megagap.data.sources import TRAINING, WHOLE, TokenSource, positions_in
from megagap.errors import DataError
from megagap.timeline import Source
from tests.few import S, WriteTokens, numbered


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=3), st.integers(1, 5))
def test_windows_are_the_concatenated_documents_cut_with_one_token_shared(shards: list[list[int]], s: int) -> None:
    owners = [d for d, length in enumerate(sum(shards, [])) for _ in range(length)]
    stream = list(range(len(owners)))
    with tempfile.TemporaryDirectory() as folder:
        token = 0
        for i, lengths in enumerate(shards):
            with IndexedDatasetWriter(f"{folder}/{i}", "uint16" if i % 2 else "int32") as writer:
                for length in lengths:
                    writer.add_document(range(token, token + length))
                    token += length
        source = Source("x", tuple(f"{folder}/{i}" for i in range(len(shards))))
        if len(stream) <= s:
            with pytest.raises(DataError, match=f"source x has {len(stream)} tokens"):
                TokenSource(source, "100,0,0", TRAINING).require(s)
            return
        opened = TokenSource(source, "100,0,0", TRAINING)
        windows = range(0, len(stream) - s, s)
        assert opened.window_count(s) == len(windows)
        for window, start in enumerate(windows):
            assert opened.window(window, s).tolist() == stream[start : start + s + 1]
            assert opened.documents(start, start + s + 1) == sorted(set(owners[start : start + s + 1]))
            firsts = [owners.index(owner) for owner in owners[start : start + s + 1]]
            expected = [at - max(first, start) for at, first in enumerate(firsts, start)]
            assert positions_in([opened.read_documents(start, start + s + 1)[1]], s + 1).tolist() == [expected]


def test_split_parts_share_no_document(write_tokens: WriteTokens) -> None:
    source = Source("x", (write_tokens("a", numbered(6)), write_tokens("b", numbered(4, first=42))))
    seen = []
    for part in range(3):
        opened = TokenSource(source, "50,30,20", part)
        seen.append(set(opened.documents(0, opened.token_count)))
    assert seen == [{0, 1, 2, 3, 4}, {5, 6, 7}, {8, 9}]


def test_part_too_small_for_a_sequence_says_how_many_tokens_it_has(write_tokens: WriteTokens) -> None:
    source = Source("fr", (write_tokens("fr", numbered(10, 3)),))
    with pytest.raises(DataError, match=r"source fr has 3 tokens in 1 document in its validation part.* needs 5"):
        TokenSource(source, "90,10,0", 1).require(S)


def test_a_source_that_names_a_shard_twice_is_refused(write_tokens: WriteTokens) -> None:
    one, other = write_tokens("a", numbered(9)), write_tokens("b", numbered(9))
    with pytest.raises(DataError, match=r"source x lists .*/a 2 times"):
        TokenSource(Source("x", (one, other, one)), "100,0,0", TRAINING)


def test_source_out_of_file_order_is_refused(write_tokens: WriteTokens) -> None:
    prefix = write_tokens("x", [[1, 2], [3, 4], [5, 6]])
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[46:54], index[54:62] = index[54:62], index[46:54]  # the pointers of documents 0 and 1
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(DataError, match=r"sequence 0 .* starts at byte 4"):
        TokenSource(Source("x", (prefix,)), "100,0,0", WHOLE)


def swap_pointers(prefix: str, one: int, other: int) -> None:
    """Those of two documents of equal length: the index is no longer in file order."""
    with open(f"{prefix}.idx", "r+b") as file:
        index = bytearray(file.read())
        at = [34 + 4 * int.from_bytes(index[18:26], "little") + 8 * i for i in (one, other)]
        index[at[0] : at[0] + 8], index[at[1] : at[1] + 8] = index[at[1] : at[1] + 8], index[at[0] : at[0] + 8]
        file.seek(0)
        file.write(index)


@pytest.mark.parametrize("entry", [3_000, 4_999])
def test_an_index_out_of_order_is_refused_where_it_is_read_and_nothing_else(
    write_tokens: WriteTokens, entry: int
) -> None:
    """Opening looks at its ends only; no window gives tokens of other documents than the index says."""
    prefix = write_tokens("x", numbered(9000, 3))
    swap_pointers(prefix, entry, entry + 1)
    source = TokenSource(Source("x", (prefix,)), "100,0,0", TRAINING)
    spoilt = range(entry * 3, entry * 3 + 6)
    refused = []
    for start in range(0, source.token_count, 10):
        stop = min(start + 11, source.token_count)
        try:
            assert source.read(start, stop).tolist() == list(range(start, stop))
        except DataError as error:
            assert "damaged or not in file order" in str(error)
            refused += list(range(start, stop))
    assert set(spoilt) <= set(refused) and len(refused) <= 44


def test_lengths_that_do_not_add_up_are_refused_where_they_are_read(write_tokens: WriteTokens) -> None:
    prefix = write_tokens("x", numbered(9000, 3))
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(34 + 4 * 4000)
        file.write((2).to_bytes(4, "little"))
    source = TokenSource(Source("x", (prefix,)), "100,0,0", TRAINING)
    assert source.read(0, 1000).tolist() == list(range(1000))
    for start in (11_990, 12_000, 12_002):
        with pytest.raises(DataError, match="sequences around number"):
            source.read(start, start + 20)


def test_opening_does_not_depend_on_the_number_of_documents_and_samples(tmp_path: Path) -> None:
    """10^8 documents (nearly all empty, so that the index is a hole on the disk) and 10^9 samples, beside 10^4."""
    sequence_length = 8
    for name, documents, longest in (("huge", 10**8, 2**31 - 1), ("small", 10**4, 2**20)):
        write_sparse_pair(tmp_path / name, documents, longest)
    program = f"""
import sys, time
from megagap.data.loader import MicrobatchLoader
from megagap.data.samples import TrainingData
from megagap.timeline import Phase, Source, Timeline
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
prefix, samples = sys.argv[1], int(sys.argv[2])
before, begin = resident(), time.process_time()  # of this process: others may delay it
sources = (Source("x", (prefix,)),)
phases = [Phase(name, samples * length, length, sources) for name, length in (("a", {sequence_length}), ("b", 16))]
data = TrainingData(Timeline(phases, [(0, 64)]), 1, vocab_size=10)
batch = MicrobatchLoader(data, 4).step(samples // 64)
assert batch.tokens.shape == (16, 4, 9)
data.batch(samples + 64, 64)  # beyond the first phase, which ends at a whole step
assert data.sources[0].window_count({sequence_length}) > samples // 4
seconds = time.process_time() - begin
print(seconds, resident() - before, data.sources[0].document_count)
"""
    seconds: dict[str, list[float]] = {"huge": [], "small": []}
    megabytes: dict[str, list[float]] = {"huge": [], "small": []}
    for _ in range(3):  # alternately, and the best of each: other load on the machine only adds
        for name, samples in (("huge", 10**9), ("small", 10**5)):
            command = [sys.executable, "-c", program, str(tmp_path / name), str(samples)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            taken, grown, documents = done.stdout.split()
            assert int(documents) == {"huge": 10**8, "small": 10**4}[name]
            seconds[name].append(float(taken))
            megabytes[name].append(float(grown))
    print(seconds, megabytes)
    # Reading the lengths alone would take 10^4 times the small one's time, and 400 MB.
    assert min(seconds["huge"]) < 10 * min(seconds["small"])
    assert min(megabytes["huge"]) < min(megabytes["small"]) + 150
    for path in tmp_path.iterdir():
        path.unlink()


def write_sparse_pair(prefix: Path, documents: int, longest: int) -> None:
    """``documents`` of which the last four have ``longest`` tokens each, all 0, and the others none."""
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        pointers_at, ends_at = 34 + 4 * documents, 34 + 12 * documents
        index.seek(pointers_at - 16)
        index.write(np.array([longest] * 4, "<i4").tobytes())
        index.seek(ends_at - 32)
        index.write((np.arange(4, dtype="<i8") * longest * 2).tobytes())
        index.seek(ends_at + 8 * documents)
        index.write(np.array([documents], "<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as tokens:
        tokens.truncate(8 * longest)
