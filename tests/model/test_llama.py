"""The model equals transformers' Llama and OLMo 2: logits, loss and every gradient."""

import pytest
import torch

from megagap.model.init import initialise
from megagap.model.llama import build_whole
from tests.huggingface import OLMO2, reference_model
from tests.models import SCALING, tiny_model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"head_dim": 12},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_scaling": SCALING, "rope_theta": 10000.0},
        OLMO2,
        OLMO2 | {"head_dim": 12, "attention_bias": True, "rope_scaling": SCALING},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_logits_loss_and_gradients_equal_transformers(changes):
    model = tiny_model(**changes)
    reference = reference_model(model)
    stage = build_whole(model)
    theirs = dict(reference.named_parameters())
    assert {p.shard.name for p in stage.sharded_parameters()} == theirs.keys()
    with torch.no_grad():
        for parameter in stage.sharded_parameters():
            parameter.copy_(theirs[parameter.shard.name])
    tokens = torch.randint(0, 61, (3, 33), generator=torch.Generator().manual_seed(1))

    y = stage(tokens[:, :-1], 32)
    logits = stage.logits(y)
    expected = reference(tokens[:, :-1]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    loss, *_ = stage.loss(y, tokens[:, 1:], torch.ones(()))
    loss.backward()
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for parameter in stage.sharded_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[parameter.shard.name].grad, rtol=1e-4, atol=2e-5, msg=parameter.shard.name
        )


def test_a_gain_scale_changes_no_initial_output():
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    outputs = []
    for scale in (1.0, 20.0):
        model = tiny_model(norm_gain_scale=scale)
        stage = build_whole(model)
        initialise(stage.sharded_parameters(), model, seed=0)
        outputs.append(stage.logits(stage(tokens, 9)))
    gains = [p for p in stage.sharded_parameters() if p.shard.name.endswith("norm.weight")]
    assert all(torch.equal(gain, torch.full_like(gain, 1 / 20)) for gain in gains)
    torch.testing.assert_close(*outputs)
