"""Recomputation changes what is kept for the backward pass, and no gradient by a bit."""

import pytest
import torch
from torch import Tensor

from megagap.model.init import initialise
from megagap.model.llama import LlamaStage, build_stages
from megagap.ops.document_mask import Documents
from megagap.parallel.mesh import Mesh
from megagap.parallel.placement import Placement
from tests.models import tiny_model

LENGTH = 160
"""Of a sequence: attention keeps its probabilities, where the kernels are built."""

MODES = ("none", "selective", "full")


def stage_of(recompute: str, dtype: torch.dtype = torch.float32) -> LlamaStage:
    model = tiny_model(attention_bias=True, mlp_bias=True, max_position_embeddings=LENGTH)
    (stage,) = build_stages(
        model,
        Placement.loop([model.num_hidden_layers]),
        Mesh.single(),
        sequence_parallel=False,
        dtype=torch.float32,
        recompute=recompute,  # type: ignore[arg-type]
    )
    initialise(stage.sharded_parameters(), model, 3)
    for parameter in stage.parameters():
        parameter.data = parameter.data.to(dtype)
    return stage


def tokens() -> Tensor:
    return torch.randint(61, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def loss(stage: LlamaStage, documents: Documents | None = None) -> Tensor:
    y = stage(tokens()[:, :-1], LENGTH, documents=documents)
    return stage.loss(y, tokens()[:, 1:], torch.ones(()))[0]


def gradients(stage: LlamaStage) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in stage.parameters()]


def require_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_without_recomputation_bit_for_bit(recompute, masked, dtype):
    documents = None
    if masked:
        places = torch.cat([torch.arange(LENGTH - 131), torch.arange(131)])
        documents = Documents.of(torch.stack([places, torch.arange(LENGTH)]))
    found = {}
    for mode in ("none", recompute):
        stage = stage_of(mode, dtype)
        loss(stage, documents).backward()
        found[mode] = gradients(stage)
    require_same_bits(found[recompute], found["none"])


@pytest.mark.parametrize("recompute", MODES)
def test_several_microbatches_are_in_flight_and_go_backward_in_any_order(recompute):
    found = []
    for mode in ("none", recompute):
        stage = stage_of(mode)
        losses = [loss(stage) * factor for factor in (1, 3)]
        for one in reversed(losses):
            one.backward()
        found.append(gradients(stage))
    require_same_bits(*found)


@pytest.mark.parametrize("recompute", MODES)
def test_weight_gradients_that_are_deferred_are_the_same(recompute):
    stage = stage_of(recompute)
    loss(stage).backward()
    expected = gradients(stage)
    stage.zero_grad()
    with stage.queue.deferring() as jobs:
        loss(stage).backward()
    assert len(jobs) == 4 * len(stage.layers)
    with torch.no_grad():
        for job in jobs:
            job()
    require_same_bits(gradients(stage), expected)


def test_each_layer_runs_twice_in_full_and_once_otherwise(monkeypatch):
    calls = dict.fromkeys(MODES, 0)
    for mode in MODES:
        stage = stage_of(mode)

        def count(*_: object, mode: str = mode) -> None:
            calls[mode] += 1

        for layer in stage.layers:
            layer.register_forward_pre_hook(count)
        loss(stage).backward()
        with torch.no_grad():
            loss(stage)
    layers = len(stage.layers)
    assert calls == {"none": 2 * layers, "selective": 2 * layers, "full": 3 * layers}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_layer_keeps_no_parameter_but_reads_it_again(recompute):
    """So that its storage may be freed and filled again in between: what it was given is not read in the rerun."""
    stage = stage_of(recompute)
    expected = stage_of("none")
    loss(expected).backward()
    total = loss(stage)
    moved = [norm.weight for layer in stage.layers for norm in (layer.input_layernorm,)]
    if recompute == "full":
        moved = [parameter for layer in stage.layers for parameter in layer.parameters()]
    for parameter in moved:
        before = parameter.data
        parameter.data = before.clone()
        if recompute == "full":
            before.fill_(torch.nan)
    total.backward()
    require_same_bits(gradients(stage), gradients(expected))
