import json
import shutil
import time
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from megagap.checkpoint import Chunk, Index, StoredTensor, rectangles, save_checkpoint
from megagap.errors import CheckpointError
from megagap.parallel.shard import Shard, Slice, whole


@given(st.data())
def test_rectangles_tile_a_flat_interval_in_order_with_at_most_2n_minus_1(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    start = data.draw(st.integers(0, prod(sizes)))
    stop = data.draw(st.integers(start, prod(sizes)))

    numbered = torch.arange(prod(sizes)).view(sizes)
    found = list(rectangles(sizes, start, stop))
    pieces = [
        numbered[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))].reshape(-1)
        for offsets, lengths in found
    ]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *pieces]).tolist() == list(range(start, stop))
    assert all(len(piece) for piece in pieces)
    assert len(found) <= 2 * len(sizes) - 1


def test_a_scalar_is_one_rectangle() -> None:
    assert list(rectangles((), 0, 1)) == [((), ())]


def save_matrix(folder: Path) -> torch.Tensor:
    """A 6 x 4 matrix in two chunks of one file."""
    matrix = torch.arange(24.0).view(6, 4)
    shard = whole("w", (6, 4))
    parts = [Slice("weight", shard, 0, 8, matrix.view(-1)[:8]), Slice("weight", shard, 8, 24, matrix.view(-1)[8:])]
    save_checkpoint(folder, parts, {"step": 1})
    return matrix


def tamper(folder: Path, change: Any) -> None:
    """Change the index as an informed attacker would: with a matching checksum."""
    document = json.loads((folder / "index.json").read_text())["body"]
    change(document)
    body = json.dumps(document) + "}\n"
    digest = xxhash.xxh3_64_hexdigest(body.encode())
    (folder / "index.json").write_text(f'{{"checksum":"{digest}","body":{body}')


def set_chunk(field: str, value: Any, chunk: int = 0) -> Any:
    return lambda body: body["tensors"][0]["chunks"][chunk].__setitem__(field, value)


HOSTILE = {
    "chunk_outside_the_shape": set_chunk("offsets", [5, 0]),
    "chunks_overlap": set_chunk("offsets", [0, 0], chunk=1),
    "gap": lambda body: body["tensors"][0]["chunks"].pop(),
    "larger_shape": lambda body: body["tensors"][0].__setitem__("shape", [7, 4]),
    "negative_offset": set_chunk("offsets", [-1, 0]),
    "huge_offset": set_chunk("offsets", [2**63, 0]),
    "huge_sizes": set_chunk("sizes", [2**60, 2**60]),
    "empty_chunk": set_chunk("sizes", [0, 4]),
    "missing_dimension": set_chunk("offsets", [0]),
    "float_offset": set_chunk("offsets", [0.0, 0]),
    "boolean_offset": set_chunk("offsets", [False, 0]),
    "bytes_do_not_fit_sizes": set_chunk("end", 10**6),
    "bytes_begin_elsewhere": lambda body: [
        set_chunk(field, body["tensors"][0]["chunks"][0][field] - 4)(body) for field in ("begin", "end")
    ],
    "chunks_share_bytes": lambda body: [
        set_chunk(field, body["tensors"][0]["chunks"][1][field])(body) for field in ("begin", "end", "sizes")
    ],
    "unlisted_file": set_chunk("file", "rank_00009.safetensors"),
    "file_listed_twice": lambda body: body["files"].append(body["files"][0]),
    "file_missing": lambda body: body["files"].append(body["files"][0] | {"name": "rank_00001.safetensors"}),
    "file_size": lambda body: body["files"][0].__setitem__("size", 64),
    "header_size": lambda body: body["files"][0].__setitem__("header_size", 8),
    "tensor_listed_twice": lambda body: body["tensors"].append(body["tensors"][0]),
    "unknown_dtype": lambda body: body["tensors"][0].__setitem__("dtype", "O"),
    "other_dtype": lambda body: body["tensors"][0].__setitem__("dtype", "F64"),
    "unknown_field": lambda body: body.__setitem__("pickle", "x"),
    "unknown_format": lambda body: body.__setitem__("format", 2),
    "missing_field": lambda body: body.pop("state"),
    "state_no_object": lambda body: body.__setitem__("state", []),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_an_index_that_contradicts_itself_is_refused_naming_the_folder(tmp_path: Path, change: Any) -> None:
    save_matrix(tmp_path / "step_1")
    tamper(tmp_path / "step_1", change)
    with pytest.raises(CheckpointError, match="step_1"):
        Index.read(tmp_path / "step_1")


@pytest.mark.parametrize("place", ["../{}", "{tmp_path}/{}", "inner/{}", "{}\n", "weights.safetensors"])
def test_a_file_name_other_than_a_ranks_is_refused_even_if_its_bytes_are_right(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "step_1"
    save_matrix(folder)
    name = place.format("rank_00000.safetensors", tmp_path=tmp_path)
    (folder / "inner").mkdir()
    shutil.copyfile(folder / "rank_00000.safetensors", folder / name)

    def point_there(body: Any) -> None:
        for chunk in body["tensors"][0]["chunks"]:
            chunk["file"] = name
        body["files"][0]["name"] = name

    tamper(folder, point_there)
    with pytest.raises(CheckpointError, match=r"step_1/index\.json: files\.0\.name"):
        Index.read(folder)


def test_an_untouched_index_is_read_back(tmp_path: Path) -> None:
    save_matrix(tmp_path / "step_1")
    tamper(tmp_path / "step_1", lambda body: None)
    index = Index.read(tmp_path / "step_1")
    assert index.state == {"step": 1}
    assert index.tensor(tmp_path, "weight", "w").shape == (6, 4)


@pytest.mark.parametrize("text", ["", "{", "null", '{"checksum":"0123456789abcdef","body":{}}\n', "[" * 100_000])
def test_a_file_that_is_not_an_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        Index.read(tmp_path)


def test_deep_nesting_in_a_valid_wrapper_is_refused(tmp_path: Path) -> None:
    body = '{"state":' + '{"a":' * 5000 + "1" + "}" * 5000 + "}}\n"
    digest = xxhash.xxh3_64_hexdigest(body.encode())
    (tmp_path / "index.json").write_text(f'{{"checksum":"{digest}","body":{body}')
    with pytest.raises(CheckpointError):
        Index.read(tmp_path)


def test_a_folder_without_index_is_refused_saying_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="RUN/checkpoints/step_"):
        Index.read(tmp_path / "nowhere")


def test_a_truncated_file_is_refused_naming_both_sizes(tmp_path: Path) -> None:
    save_matrix(tmp_path)
    file = tmp_path / "rank_00000.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(size - 1)
    with pytest.raises(CheckpointError, match=f"{size - 1:,} bytes, the index promises {size:,}"):
        Index.read(tmp_path)


def grid_of_chunks(rows: int, columns: int) -> StoredTensor:
    chunks = tuple(
        Chunk(offsets=(i, j), sizes=(1, 1), file="f", begin=0, end=4, checksum="0" * 16)
        for i in range(rows)
        for j in range(columns)
    )
    return StoredTensor(kind="weight", name="w", shape=(rows, columns), dtype="F32", chunks=chunks)


@given(st.data())
def test_coverage_equals_counting_every_element(data: st.DataObject) -> None:
    from megagap.checkpoint.index import _coverage_fault

    tensor = grid_of_chunks(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    counts = torch.zeros(tensor.shape)
    chunks = list(data.draw(st.permutations(tensor.chunks)))
    if data.draw(st.booleans()):  # move one chunk elsewhere
        offsets = tuple(data.draw(st.integers(0, length - 1)) for length in tensor.shape)
        chunks[0] = chunks[0].model_copy(update={"offsets": offsets})
    for chunk in chunks:
        counts[chunk.offsets] += 1
    fault = _coverage_fault(tensor.model_copy(update={"chunks": tuple(chunks)}))
    assert (fault is None) == bool((counts == 1).all())


def test_the_time_to_read_an_index_grows_with_its_chunks_and_not_with_their_square(tmp_path: Path) -> None:
    seconds: dict[int, list[float]] = {2: [], 32: []}
    for ranks in seconds:
        parts = []
        for number in range(110):
            for rank in range(ranks):
                shard = Shard(f"t{number}", (ranks, 7), (rank, 0), (1, 7), (1, 7))
                parts += [Slice("weight", shard, a, b, torch.zeros(b - a)) for a, b in ((0, 2), (2, 5), (5, 7))]
        save_checkpoint(tmp_path / f"step_{ranks}", parts, {})
    for _ in range(3):
        for ranks, measured in seconds.items():
            begin = time.process_time()
            index = Index.read(tmp_path / f"step_{ranks}")
            measured.append(time.process_time() - begin)
            assert sum(len(tensor.chunks) for tensor in index.tensors) == ranks * 110 * 3
    # 16 times as many chunks: 256 times the time, if each were compared with all others of its tensor.
    assert min(seconds[32]) < 50 * min(seconds[2])
