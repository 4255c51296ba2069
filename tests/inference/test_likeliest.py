"""Whether a target is the likeliest token is known on every tp rank, as ``argmax`` of the whole logits says."""

import pytest
import torch

from megagap.inference.likeliest import count_misses
from megagap.model.llama import build_stages, build_whole
from megagap.parallel.cross_entropy import IGNORED_TARGET
from megagap.parallel.mesh import Mesh
from megagap.parallel.placement import Placement
from tests.models import tiny_model

MODEL = tiny_model(vocab_size=9, num_hidden_layers=1)
"""Of tp 4, whose ranks have 3 rows each, the last has none."""


def cases() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A projection [9, 32], hidden states [64, 8, 32], and targets [64, 8]. Values are few, so that many logits are
    equal; some rows have no targets."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (9, 32), generator=generator).float()
    y = torch.zeros(64, 8, 32)
    y.scatter_(-1, torch.randint(0, 32, (64, 8, 2), generator=generator), 1.0)
    targets = torch.randint(0, 9, (64, 8), generator=generator)
    right = (y @ weight.T).argmax(-1)
    targets = targets.where(torch.rand(64, 8, generator=generator) < 0.3, right)
    targets[torch.rand(64, 8, generator=generator) < 0.3] = IGNORED_TARGET
    targets[:5] = IGNORED_TARGET
    return weight, y, targets


def misses_on(rank: int, ranks: int, sequence_parallel: bool) -> list[int]:
    weight, y, targets = cases()
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank, tp=ranks, kv_sharing=max(1, ranks // 2))
    (stage,) = build_stages(MODEL, Placement.loop([1]), mesh, sequence_parallel=sequence_parallel, dtype=torch.float32)
    shard = stage.output.shard
    with torch.no_grad():
        stage.output.fill_(100)  # padding, if it counted, would be the likeliest
        stage.output[: shard.sizes[0]] = weight[shard.offsets[0] : shard.offsets[0] + shard.sizes[0]]
        own = y.chunk(ranks, 1)[rank] if sequence_parallel else y
        return count_misses(stage, own, targets).tolist()


def expected() -> list[int]:
    weight, y, targets = cases()
    missed = ((y @ weight.T).argmax(-1) != targets) & (targets != IGNORED_TARGET)
    return missed.sum(1).tolist()


def test_one_process_counts_as_argmax_does():
    weight, y, targets = cases()
    stage = build_whole(MODEL)
    with torch.no_grad():
        stage.output.copy_(weight)
        found = count_misses(stage, y, targets).tolist()
    assert found == expected() and 0 in found[5:] and max(found) > 1


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(2, True), (4, False), (4, True)])
def test_ranks_that_split_the_vocabulary_count_alike_also_where_logits_are_equal(workers, ranks, sequence_parallel):
    assert workers.run(ranks, misses_on, sequence_parallel) == [expected()] * ranks
