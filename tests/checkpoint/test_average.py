"""The mean of several checkpoints' weights."""

from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

import megagap.checkpoint.average
from megagap.checkpoint import Index, load_model, load_slices, save_checkpoint
from megagap.checkpoint.average import average_checkpoints
from megagap.checkpoint.state import read_model, read_run
from megagap.config import Model
from megagap.errors import CheckpointError
from megagap.model.shapes import model_tensors
from megagap.parallel.shard import Slice, whole
from tests.models import SHAPE

MODEL = SHAPE | dict(hidden_size=8, num_hidden_layers=1, head_dim=2, vocab_size=21)


def saved(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **changes: object) -> dict[str, Tensor]:
    """Write a checkpoint with random weights; returns them."""
    model = MODEL | changes
    generator = torch.Generator().manual_seed(seed)
    shapes = model_tensors(Model(**model))
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    slices = [Slice("weight", whole(name, tuple(x.shape)), 0, x.numel(), x.view(-1)) for name, x in tensors.items()]
    save_checkpoint(folder, slices, {"model": model, "data": {"tokenizer": "tok"}, "train": {"precision": "fp32"}})
    return tensors


def weights_of(folder: Path) -> dict[str, Tensor]:
    index = Index.read(folder)
    tensors = {}
    for name, shape in model_tensors(read_model(folder, index)).items():
        tensors[name] = torch.empty(shape, dtype=index.tensor(folder, "weight", name).torch_dtype)
        load_slices(folder, index, [Slice("weight", whole(name, shape), 0, prod(shape), tensors[name].view(-1))])
    return tensors


@pytest.mark.parametrize("piece", [7, 2**24])
def test_every_element_is_the_weighted_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(megagap.checkpoint.average, "PIECE", piece)
    parts = [saved(tmp_path / str(seed), seed) for seed in range(3)]
    given = (1.0, 2.0, 5.0)
    steps: list[tuple[int, int]] = []
    result = average_checkpoints(
        [tmp_path / str(seed) for seed in range(3)],
        tmp_path / "mean",
        given,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert result.shares == pytest.approx((1 / 8, 2 / 8, 5 / 8))
    found = weights_of(tmp_path / "mean")
    assert result.parameters == sum(tensor.numel() for tensor in found.values())
    for name, tensor in found.items():
        expected = sum(w / 8 * part[name].double() for w, part in zip(given, parts, strict=True))
        assert torch.equal(tensor, expected.float()), name
    assert steps[-1][0] == steps[-1][1] == 2 * 4 * result.parameters


def test_the_mean_of_equal_checkpoints_is_each_of_them_bit_for_bit_in_fp32(tmp_path: Path) -> None:
    tensors = saved(tmp_path / "a", 1, torch.bfloat16)
    average_checkpoints([tmp_path / "a"] * 3, tmp_path / "mean")
    found = weights_of(tmp_path / "mean")
    assert all(
        torch.equal(found[name], tensor.float()) and found[name].dtype == torch.float32
        for name, tensor in tensors.items()
    )


def test_of_several_dtypes_the_widest_is_kept(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1, torch.bfloat16)
    saved(tmp_path / "b", 2)
    average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    assert {tensor.dtype for tensor in weights_of(tmp_path / "mean").values()} == {torch.float32}


def test_the_result_is_a_model_of_no_run_and_records_what_it_is_made_of(tmp_path: Path) -> None:
    for seed in (1, 2):
        saved(tmp_path / str(seed), seed)
    average_checkpoints([tmp_path / "1", tmp_path / "2"], tmp_path / "mean", [3, 1])
    state = Index.read(tmp_path / "mean").state
    assert [part["share"] for part in state["average_of"]] == [0.75, 0.25]
    assert [Path(part["checkpoint"]).name for part in state["average_of"]] == ["1", "2"]
    assert state["data"]["tokenizer"] == "tok"
    assert load_model(tmp_path / "mean")(torch.tensor([[1, 2, 3]])).shape == (1, 3, 21)
    with pytest.raises(CheckpointError, match="holds only a model"):
        read_run(tmp_path / "mean", Index.read(tmp_path / "mean"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vocab_size=22), "model.vocab_size = 22, there 21"),
        (dict(norm_gain_scale=20.0), "model.norm_gain_scale = 20.0, there 1.0"),
        (dict(rope_theta=10_000.0), "model.rope_theta = 10000.0, there 500000.0"),
    ],
)
def test_another_model_is_refused_naming_the_setting(tmp_path: Path, change: dict[str, object], message: str) -> None:
    saved(tmp_path / "a", 1)
    saved(tmp_path / "b", 2, **change)
    with pytest.raises(CheckpointError, match=message):
        average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_another_vocabulary_of_the_same_size_is_refused(tmp_path: Path) -> None:
    for name, fingerprint in (("a", "1"), ("b", "2")):
        saved(tmp_path / name, 1)
        index = Index.read(tmp_path / name)
        ids = {"vocab_size": 21, "fingerprint": fingerprint, "bos": None, "eod": 0}
        text = index.model_copy(update={"state": index.state | {"ids": ids}}).to_json()
        (tmp_path / name / "index.json").write_text(text)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 checkpoints"),
        ([1.0, 0.0], "is not above 0"),
        ([1.0, -1.0], "is not above 0"),
        ([1.0, float("nan")], "is not above 0"),
        ([1.0, float("inf")], "is not above 0"),
    ],
)
def test_weights_that_make_no_mean_are_refused(tmp_path: Path, weights: list[float], message: str) -> None:
    for seed in (1, 2):
        saved(tmp_path / str(seed), seed)
    with pytest.raises(CheckpointError, match=message):
        average_checkpoints([tmp_path / "1", tmp_path / "2"], tmp_path / "mean", weights)
    assert not (tmp_path / "mean").exists()


def test_weights_of_a_diverged_run_are_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    tensors = saved(tmp_path / "a", 1)
    name, tensor = next(iter(tensors.items()))
    tensor.view(-1)[3] = torch.nan
    slices = [Slice("weight", whole(n, tuple(x.shape)), 0, x.numel(), x.view(-1)) for n, x in tensors.items()]
    save_checkpoint(tmp_path / "b", slices, {"model": MODEL})
    saved(tmp_path / "c", 1)
    with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
        average_checkpoints([tmp_path / "c", tmp_path / "b"], tmp_path / "mean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1)
    with pytest.raises(CheckpointError, match="is not empty"):
        average_checkpoints([tmp_path / "a"], tmp_path / "a")
