import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagap.checkpoint import Index, find_latest, load_slices, load_tensor, resolve_checkpoint, save_checkpoint
from megagap.errors import CheckpointError
from megagap.parallel.shard import Shard, Slice, split, whole

from .conftest import cut_out, layouts, part_of, run_ranks


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit patterns, NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_layout_loads_what_any_other_wrote_bit_for_bit(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3))
    tensors = {
        (kind, f"t{i}"): random_bits(shape, data.draw(st.sampled_from([torch.float32, torch.bfloat16])), seed=i)
        for i, shape in enumerate(shapes)
        for kind in ("weight", "exp_avg")
    }
    writers, readers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    written = data.draw(layouts(tensors, writers))
    wanted = data.draw(layouts(tensors, readers))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "step_1"
        saved = run_ranks(writers, lambda c: save_checkpoint(folder, cut_out(tensors, written[c.rank]), {}, c))
        assert saved == [None] * writers
        index = Index.read(folder)
        for requests in wanted:
            expected = cut_out(tensors, requests)
            found = [Slice(s.kind, s.shard, s.start, s.stop, torch.zeros_like(s.tensor)) for s in expected]
            load_slices(folder, index, found)
            assert all(same_bits(a.tensor, b.tensor) for a, b in zip(expected, found, strict=True))
        for (kind, name), tensor in tensors.items():
            assert same_bits(load_tensor(folder, index, kind, name), tensor)


def test_a_vocabulary_padded_for_one_tp_loads_into_another(tmp_path: Path) -> None:
    table = torch.randn(509, 3)

    def slices(size: int, dp: int) -> list[Slice]:
        """What the ranks of a layout tp ``size``, dp ``dp`` hold."""
        found = []
        for rank in range(size):
            shard = split("embed", (509, 3), 0, rank, size)
            border = shard.numel // dp
            for start, stop in [(0, border), (border, shard.numel)]:
                found.append(Slice("weight", shard, start, stop, part_of(table, shard)[start:stop].clone()))
        return found

    save_checkpoint(tmp_path / "c", slices(6, 2), {})
    wanted = slices(4, 3)
    expected = [part.tensor.clone() for part in wanted]
    for part in wanted:
        part.tensor.zero_()
    load_slices(tmp_path / "c", Index.read(tmp_path / "c"), wanted)
    assert all(torch.equal(part.tensor, values) for part, values in zip(wanted, expected, strict=True))


def test_replicas_may_ask_for_the_same_elements(tmp_path: Path) -> None:
    shard = whole("norm", (8,))
    save_checkpoint(tmp_path / "c", [Slice("weight", shard, 0, 8, torch.arange(8.0))], {})
    wanted = [Slice("weight", shard, 2, 6, torch.zeros(4)) for _ in range(2)]
    load_slices(tmp_path / "c", Index.read(tmp_path / "c"), wanted)
    assert [part.tensor.tolist() for part in wanted] == [[2.0, 3.0, 4.0, 5.0]] * 2


def test_a_scalar_is_stored_and_loaded(tmp_path: Path) -> None:
    # Shard describes tensors with at least one dimension; one element is the minimum.
    save_checkpoint(tmp_path / "c", [Slice("weight", whole("one", (1,)), 0, 1, torch.tensor([3.0]))], {})
    assert load_tensor(tmp_path / "c", Index.read(tmp_path / "c"), "weight", "one").tolist() == [3.0]


def small_checkpoint(folder: Path) -> list[Slice]:
    """Two tensors, three kinds, two ranks; a few hundred bytes per file."""
    parts = [
        Slice(kind, shard, start, stop, torch.arange(float(start), float(stop)))
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for shard in (whole("a", (3, 4)), whole("b", (5,)))
        for start, stop in ((0, 2), (2, shard.numel))
    ]
    run_ranks(2, lambda c: save_checkpoint(folder, parts[c.rank :: 2], {"step": 1, "text": "état"}, c))
    return parts


def test_a_flipped_bit_in_any_byte_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "step_1"
    wanted = small_checkpoint(folder)
    tried = 0
    for file in folder.iterdir():
        content = file.read_bytes()
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError, match="step_1"):
                load_slices(folder, Index.read(folder), wanted)
            tried += 1
        file.write_bytes(content)
    assert tried > 2000
    load_slices(folder, Index.read(folder), wanted)


def test_the_message_for_a_damaged_chunk_names_file_and_place(tmp_path: Path) -> None:
    wanted = small_checkpoint(tmp_path / "c")
    file = tmp_path / "c" / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    place = r"rank_00001\.safetensors, bytes [0-9,]+ to [0-9,]+"
    with pytest.raises(CheckpointError, match=place + r" \(\w+ of [ab]\): the checksum"):
        load_slices(tmp_path / "c", Index.read(tmp_path / "c"), wanted)


@pytest.fixture
def matrix(tmp_path: Path) -> tuple[Path, Index]:
    folder = tmp_path / "step_1"
    save_checkpoint(folder, [Slice("weight", whole("w", (4, 4)), 0, 16, torch.arange(16.0))], {})
    return folder, Index.read(folder)


def request(name: str = "w", shape: tuple[int, int] = (4, 4), dtype: torch.dtype = torch.float32) -> Slice:
    return Slice("weight", Shard(name, shape, (0, 0), shape, shape), 0, 4, torch.zeros(4, dtype=dtype))


def test_a_missing_tensor_is_refused_by_name(matrix: tuple[Path, Index]) -> None:
    with pytest.raises(CheckpointError, match="does not contain weight of v"):
        load_slices(*matrix, [request("v")])


def test_another_shape_is_refused_naming_both(matrix: tuple[Path, Index]) -> None:
    with pytest.raises(CheckpointError, match=r"shape \[4, 4\].* this model has \[5, 4\]"):
        load_slices(*matrix, [request(shape=(5, 4))])


def test_another_dtype_is_refused_unless_casting_is_asked_for(matrix: tuple[Path, Index]) -> None:
    wanted = request(dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"float32.*bfloat16"):
        load_slices(*matrix, [wanted])
    assert not wanted.tensor.any()
    load_slices(*matrix, [wanted], cast=True)
    assert wanted.tensor.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_run_its_checkpoints_and_a_checkpoint_all_name_the_checkpoint(matrix: tuple[Path, Index]) -> None:
    folder, _ = matrix
    run = folder.parent / "run"
    run.mkdir()
    moved = run / "checkpoints" / "step_1"
    moved.parent.mkdir()
    folder.rename(moved)
    assert find_latest(moved.parent) == moved
    assert [resolve_checkpoint(path) for path in (run, run / "checkpoints", moved)] == [moved] * 3


def test_a_path_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is an empty folder, not a checkpoint"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(tmp_path / "nowhere")


def test_masters_kept_as_bf16_and_a_remainder_are_stored_as_fp32_and_loaded_with_every_bit(tmp_path):
    numbers = torch.randn(24, generator=torch.Generator().manual_seed(0))
    numbers[:4] = torch.tensor([1 + 2**-8, -1 - 2**-8, 3.4028e38, -0.0])  # half way, and larger than bf16's largest
    shard = whole("w", (6, 4))
    kept = Slice("weight", shard, 0, 24, torch.zeros(24).bfloat16(), torch.zeros(24, dtype=torch.int16))
    kept.write(numbers)
    for name, part in (("kept", kept), ("whole", Slice("weight", shard, 0, 24, numbers))):
        save_checkpoint(tmp_path / name, [part], {})
    files = [tmp_path / name / "rank_00000.safetensors" for name in ("kept", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    cut = Shard("w", (6, 4), (0, 1), (5, 2), (5, 2))
    wanted = Slice("weight", cut, 1, 9, torch.zeros(8).bfloat16(), torch.zeros(8, dtype=torch.int16))
    load_slices(tmp_path / "whole", Index.read(tmp_path / "whole"), [wanted])
    expected = numbers.view(6, 4)[:5, 1:3].flatten()[1:9]
    assert torch.equal(wanted.read().view(torch.int32), expected.view(torch.int32))
