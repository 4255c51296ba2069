"""Context parallelism: the tokens of each rank, attention to those of other ranks, what is refused."""

import re

import pytest
import torch

from megagap.config import load_recipe
from megagap.errors import ConfigError
from megagap.ops.document_mask import Documents, masked_attention
from megagap.parallel.context import OwnDocuments, context_attention, own_tokens, places_of
from megagap.parallel.mesh import Mesh
from tests.recipes import write_recipe
from tests.training_run import train_recipe

MODES = ["ring", "alltoall", "allgather"]
CPU = torch.device("cpu")


def test_the_ranks_have_every_token_once_and_causal_attention_is_as_much_work_on_each():
    size, length = 4, 48
    places = [places_of(rank, size, length, CPU) for rank in range(size)]
    assert sorted(torch.cat(places).tolist()) == list(range(length))
    assert len({int(part.sum()) for part in places}) == 1
    assert all((part.diff() > 0).all() for part in places)


def inputs(length, heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    q, grad = (torch.randn(2, length, heads[0], 8, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, length, heads[1], 8, generator=generator).to(dtype) for _ in range(2))
    return q, k, v, grad


def positions(length, starts):
    """Of documents that start at these places, in each of the sequences."""
    rows = [torch.cat([torch.arange(b - a) for a, b in zip([0, *row], [*row, length], strict=True)]) for row in starts]
    return torch.stack(rows)


def attend(rank, ranks, mode, heads, length, starts):
    """This rank's result and gradients of q, k and v."""
    mesh = Mesh.create(device=CPU, world_size=ranks, rank=rank, cp=ranks)
    own = [own_tokens(x.movedim(1, -1), mesh.cp).movedim(-1, 1).contiguous() for x in inputs(length, heads)]
    q, k, v = (x.requires_grad_() for x in own[:3])
    documents = OwnDocuments.of(Documents.of(positions(length, starts)), mesh.cp) if starts else None
    out = context_attention(q, k, v, mesh.cp, mode, documents)
    out.backward(own[3])
    return [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)]


def expected(heads, length, starts):
    q, k, v, grad = inputs(length, heads)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = masked_attention(q, k, v, positions(length, starts or [[], []]))
    out.backward(grad)
    return [x.detach() for x in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("heads", "length", "starts"),
    [
        ((6, 6), 12, None),
        ((6, 2), 48, None),
        ((6, 1), 24, [[1, 2, 17], []]),
        ((6, 3), 24, [[6, 12, 18], [4, 8, 12, 16, 20]]),  # at the borders of pieces: blocks that see nothing
        ((6, 3), 24, [list(range(1, 24)), [23]]),  # documents of one token
    ],
    ids=str,
)
def test_results_and_gradients_are_those_of_whole_sequences(workers, mode, ranks, heads, length, starts):
    results = workers.run(ranks, attend, mode, heads, length, starts)
    for rank, parts in enumerate(results):
        places = places_of(rank, ranks, length, CPU)
        for got, wanted in zip(parts, expected(heads, length, starts), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), wanted[:, places])


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("ranks", "length", "parallel", "told"),
    [
        (
            4,
            30,
            ["cp=4"],
            "train.sequence_length = 30 must be a multiple of 2 × parallel.cp, that is of 8; nearest: 24 or 32",
        ),
        (6, 32, ["cp=2", "tp=3"], "parallel.tp = 3 does not divide"),
        (8, 36, ["cp=2", "tp=4"], "that is of 8; nearest: 32 or 40"),
        (4, 2, ["cp=2", "sequence_parallel=false"], "that is of 4; nearest: 4"),
        (
            8,
            32,
            ["cp=8", "context_mode=alltoall"],
            "does not divide the 4 attention heads of each tensor",
        ),
        (8, 32, ["cp=4", "tp=2", "context_mode=alltoall"], "possible: 1, 2; or set parallel.context_mode"),
        (3, 32, ["cp=2"], "parallel.tp × parallel.pp × parallel.cp = 2 does not divide the 3 processes"),
        (2, 32, ["cp=0"], "parallel.cp = 0"),
        (2, 32, ["cp=2", "context_mode=spiral"], "parallel.context_mode"),
    ],
    ids=str,
)
def test_a_layout_that_cannot_be_is_refused_with_the_nearest_that_can(tmp_path, ranks, length, parallel, told):
    recipe = write_recipe(tmp_path, train=dict(sequence_length=length))
    with pytest.raises(ConfigError) as refused:
        load_recipe(recipe, [f"parallel.{setting}" for setting in parallel], ranks)
    assert told in re.sub(" +", " ", str(refused.value))


# --------------------------------------------------------------------------------------- checkpoints, resuming


def test_a_run_goes_on_bit_for_bit_and_its_checkpoint_loads_without_context_parallelism(workers, tmp_path):
    recipe = write_recipe(tmp_path, model=dict(num_hidden_layers=2), train=dict(steps=4))
    cp = ["parallel.cp=2"]
    parts = [*cp, f"run.dir={tmp_path / 'parts'}", "optim.schedule=constant"]
    whole = workers.run(2, train_recipe, recipe, [*cp, f"run.dir={tmp_path / 'w'}", "optim.schedule=constant"])[0]
    workers.run(2, train_recipe, recipe, [*parts, "train.steps=2"])
    resumed = workers.run(2, train_recipe, recipe, parts)[0]
    compared = ("loss", "grad_norm")
    assert [[r[key] for key in compared] for r in resumed] == [[r[key] for key in compared] for r in whole]

    load = f"checkpoint.load={tmp_path / 'parts/checkpoints/step_00000002'}"
    for ranks, layout in ((1, []), (4, ["parallel.cp=4"]), (2, ["parallel.tp=2"])):
        run = f"run.dir={tmp_path / str(layout)}"
        others = workers.run(ranks, train_recipe, recipe, [load, run, "optim.schedule=constant", *layout])[0]
        assert [r["loss"] for r in others][-2:] == pytest.approx([r["loss"] for r in whole][-2:], rel=1e-5)
