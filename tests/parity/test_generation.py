"""Greedy text equals transformers' generate."""

import pytest
import torch
from transformers import LlamaForCausalLM

from megagap.checkpoint import load_model
from megagap.checkpoint.huggingface_import import import_model, load_hugging_face_model
from megagap.config import Model
from megagap.inference.generation import generate
from tests.huggingface import reference_model
from tests.models import SCALING, tiny_model

SHAPE = dict(num_hidden_layers=3, vocab_size=211, max_position_embeddings=128)
NEW = 100


def decided_model(model: Model, seed: int) -> LlamaForCausalLM:
    """A random model whose matrices are so large that its likeliest tokens lead clearly."""
    reference = reference_model(model, seed).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return reference


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "head_dim": 12},
        {"rope_scaling": SCALING, "rope_theta": 10000.0},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
@pytest.mark.parametrize("prompt_length", [1, 17])
def test_100_greedy_tokens_equal_transformers_with_and_without_the_cache(tmp_path, changes, prompt_length):
    reference = decided_model(tiny_model(**(SHAPE | changes)), seed=prompt_length)
    reference.save_pretrained(tmp_path / "hf")
    prompt = torch.randint(0, 211, (1, prompt_length), generator=torch.Generator().manual_seed(2))
    made = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = made.sequences[0, prompt_length:].tolist()
    leads = torch.stack(made.logits).topk(2).values
    assert (leads[..., 0] - leads[..., 1]).min() > 1e-4, "too near a tie to compare"
    assert len(expected) == NEW and len(set(expected)) > 10

    read_directly = load_hugging_face_model(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "checkpoint")
    for model in (read_directly, load_model(tmp_path / "checkpoint")):
        assert list(generate(model, prompt[0].tolist(), NEW)) == expected
    tokens = prompt
    with torch.no_grad():
        for _ in range(NEW):
            tokens = torch.cat([tokens, read_directly(tokens)[:, -1:].argmax(-1)], dim=1)
    assert tokens[0, prompt_length:].tolist() == expected
