"""What one layout saves, each other loads, bit for bit: weights and moments, whatever vocabulary and precision."""

import hashlib
from pathlib import Path

import pytest
import torch

from megagap.checkpoint import Index, load_slices, save_checkpoint
from megagap.config import load_recipe
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.shard import Shard
from megagap.process.rendezvous import Process
from megagap.training.mesh import make_mesh
from megagap.training.trainer import build_state
from tests.recipes import write_recipe

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, ["optim.zero=0"]),
    "tp2": (2, ["parallel.tp=2"]),
    "tp4 pp2": (8, ["parallel.tp=4", "parallel.pp=2"]),
    "pp4 vpp1": (4, ["parallel.pp=4", "optim.zero=0"]),
    "pp2 vpp2 dp2": (4, ["parallel.pp=2", "parallel.vpp=2", "optim.zero=2"]),
    "zb-v": (2, ["parallel.pp=2", "parallel.schedule=zb-v"]),
    "dp4 zero3": (4, ["optim.zero=3"]),
    "dp8 in 4 replicas zero3": (8, ["parallel.dp_replicate=4", "optim.zero=3"]),
    "cp2 tp2": (4, ["parallel.cp=2", "parallel.tp=2"]),
    "tp2 pp2 dp2 zero1": (8, ["parallel.tp=2", "parallel.pp=2", "optim.zero=1"]),
}
VARIANTS = {
    f"{vocabulary} {'tied' if tied else 'untied'} {precision}": [
        f"model.vocab_size={vocabulary}",
        f"model.tie_word_embeddings={str(tied).lower()}",
        f"train.precision={precision}",
    ]
    for vocabulary in (127, 8193)
    for tied in (False, True)
    for precision in ("bf16-mixed", "bf16-pure")
}
KINDS = {"weight", "exp_avg", "exp_avg_sq"}


def values(kind: str, shard: Shard, dtype: torch.dtype) -> torch.Tensor:
    """This rank's part, flattened, of a global tensor that the kind and the name determine."""
    seed = int.from_bytes(hashlib.sha256(f"{kind} {shard.name}".encode()).digest()[:6], "little")
    whole = torch.randn(shard.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return whole[tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.sizes, strict=True))].reshape(-1)


def state_of(rank, ranks, recipe, overrides):
    settings = load_recipe(recipe, overrides, ranks)
    return build_state(settings, make_mesh(settings, Process(rank, ranks, rank, ranks), torch.device("cpu")))


def write(rank: int, ranks: int, recipe: Path, overrides: list[str], folder: Path) -> None:
    state = state_of(rank, ranks, recipe, overrides)
    slices = state.optimizer.slices(owned_only=True)
    for part in slices:
        part.write(values(part.kind, part.shard, part.dtype)[part.start : part.stop])
    save_checkpoint(folder, slices, {}, DistributedCommunicator(state.mesh))


def read(rank: int, ranks: int, recipe: Path, overrides: list[str], folders: list[Path]) -> list[tuple[str, str, int]]:
    """Load each of the checkpoints, compare all that this rank holds, and say how much that is."""
    state = state_of(rank, ranks, recipe, overrides)
    slices = state.optimizer.slices(owned_only=False)
    expected = [values(part.kind, part.shard, part.dtype)[part.start : part.stop] for part in slices]
    for folder in folders:
        for part in slices:
            part.write(torch.zeros_like(part.read()))
        load_slices(folder, Index.read(folder), slices)
        for part, wanted in zip(slices, expected, strict=True):
            assert torch.equal(part.read(), wanted), (folder.name, part.kind, part.shard)
    owned = state.optimizer.slices(owned_only=True)
    return [(part.kind, part.shard.name, part.stop - part.start) for part in owned]


def compare(workers, folder: Path, variant: str, pairs: dict[str, list[str]]) -> None:
    """``pairs``: the layouts that each reader loads."""
    recipe = write_recipe(folder, model=dict(num_hidden_layers=4), train=dict(global_batch_size=16))
    for writer in {name for writers in pairs.values() for name in writers}:
        ranks, layout = LAYOUTS[writer]
        workers.run(ranks, write, recipe, [*layout, *VARIANTS[variant]], folder / writer)
    for reader, writers in pairs.items():
        ranks, layout = LAYOUTS[reader]
        held = workers.run(ranks, read, recipe, [*layout, *VARIANTS[variant]], [folder / name for name in writers])
        elements: dict[tuple[str, str], int] = {}
        for kind, name, count in (entry for rank in held for entry in rank):
            elements[kind, name] = elements.get((kind, name), 0) + count
        index = Index.read(folder / reader) if (folder / reader).exists() else Index.read(folder / writers[0])
        assert elements == {(t.kind, t.name): torch.Size(t.shape).numel() for t in index.tensors}
        assert {kind for kind, _ in elements} == KINDS


@pytest.mark.parametrize(
    ("variant", "pairs"),
    [
        (
            "127 tied bf16-mixed",
            {"tp2 pp2 dp2 zero1": ["dp4 zero3"], "dp8 in 4 replicas zero3": ["cp2 tp2"]},
        ),
        ("127 untied bf16-pure", {"one": ["pp2 vpp2 dp2"], "tp4 pp2": ["zb-v", "one"]}),
        ("8193 tied bf16-pure", {"cp2 tp2": ["pp4 vpp1"], "zb-v": ["tp2"]}),
        ("8193 untied bf16-mixed", {"pp2 vpp2 dp2": ["tp2 pp2 dp2 zero1"], "dp4 zero3": ["tp4 pp2"]}),
    ],
)
def test_a_checkpoint_is_loaded_in_another_layout_bit_for_bit(workers, tmp_path, variant, pairs):
    compare(workers, tmp_path, variant, pairs)


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_layout_loads_what_each_writes_bit_for_bit(workers, tmp_path, variant):
    compare(workers, tmp_path, variant, {reader: list(LAYOUTS) for reader in LAYOUTS})
