"""The hash of gradients: exact, independent of order and of how gradients are cut, and changed by any single bit."""

from pathlib import Path

import pytest
import torch

from megagap.optim import gradient_hash
from megagap.optim.gradient_hash import as_text, hash_of, in_parts
from megagap.optim.gradient_store import GradientStore
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import Shard, ShardedParameter, split, whole
from tests.recipes import write_recipe
from tests.training_run import train_recipe


def values(count: int = 1000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3))


def odd(number: int) -> int:
    """In Python's integers, mod 2^64."""
    drawn = number * 0x9E3779B97F4A7C15 % 2**64
    shifted = (drawn - 2**64 if drawn >= 2**63 else drawn) >> 32
    return (drawn ^ shifted) * 0x9E3779B97F4A7C15 % 2**64 | 1


def by_hand(numbers: torch.Tensor, key: int) -> int:
    total = 0
    for place, bits in enumerate(numbers.view(torch.int32).tolist()):
        row, column = divmod(place, gradient_hash.WIDTH)
        total += bits * odd((key << 32) + row) * odd((1 << 31) + column)
    return total % 2**64


@pytest.mark.parametrize("key", [0, 1, 12345])
def test_it_is_the_sum_of_bits_times_odd_numbers_mod_2_to_the_64(monkeypatch, key: int):
    monkeypatch.setattr(gradient_hash, "WIDTH", 64)
    assert as_text(in_parts(hash_of(values(), key)).tolist()) == f"{by_hand(values(), key):016x}"


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_it_does_not_depend_on_how_many_elements_are_hashed_at_a_time(monkeypatch, chunk):
    monkeypatch.setattr(gradient_hash, "WIDTH", 5)
    expected = hash_of(values())
    monkeypatch.setattr(gradient_hash, "CHUNK", chunk)
    assert torch.equal(hash_of(values()), expected)


@pytest.mark.parametrize("bit", range(32))
def test_any_flip_of_one_bit_changes_it(bit: int):
    flipped = values()
    flipped.view(torch.int32)[517] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert not torch.equal(hash_of(flipped), hash_of(values()))


def test_elements_that_change_places_change_it():
    assert not torch.equal(hash_of(values().flip(0)), hash_of(values()))


def hash_in_store(shard: Shard, gradient: torch.Tensor) -> torch.Tensor:
    parameter = ShardedParameter(shard, torch.device("cpu"), torch.float32)
    store = GradientStore([parameter], Mesh.single(), torch.float32)
    store.begin(1)
    padded = torch.zeros(shard.local_shape)
    padded[: shard.sizes[0]] = gradient
    torch.autograd.backward(parameter, padded)
    store.finish()
    return gradient_hash.gradient_hash(store)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_hashes_of_the_parts_of_a_matrix_add_up_to_that_of_the_whole(dim: int):
    """With a row of padding where rows are split."""
    gradient = values(7 * 30).view(7, 30)
    parts = [split("w", (7, 30), dim, rank, 2) for rank in range(2)]
    slices = [gradient.narrow(dim, part.offsets[dim], part.sizes[dim]) for part in parts]
    hashes = [hash_in_store(part, own) for part, own in zip(parts, slices, strict=True)]
    assert torch.equal(sum(hashes), hash_in_store(whole("w", (7, 30)), gradient))
    assert not torch.equal(sum(hashes), hash_in_store(whole("v", (7, 30)), gradient))


def test_the_hash_of_one_step_is_that_of_every_way_to_shard_it(workers, tmp_path: Path):
    """Two data ranks sum the same two numbers, whatever optim.zero leaves where."""
    recipe = write_recipe(tmp_path, model={"num_hidden_layers": 2}, train={"steps": 2}, guard={"hash_every": 1})
    found = set()
    for zero in range(4):
        overrides = [f"optim.zero={zero}", "train.micro_batch_size=4", f"run.dir={tmp_path / str(zero)}"]
        found.add(workers.run(2, train_recipe, recipe, overrides)[0][0]["gradient_hash"])
    assert len(found) == 1
