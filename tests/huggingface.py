"""The reference model: ``transformers``' Llama or OLMo 2 with the shape of a recipe's."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from megagap.config import Model

OLMO2 = dict(norm_position="post", qk_norm=True)


def reference_config(model: Model) -> LlamaConfig | Olmo2Config:
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= model.rope_scaling.model_dump()
    names = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
    ]
    shape = {name: getattr(model, name) for name in names} | {"rope_parameters": rope, "attn_implementation": "eager"}
    if model.qk_norm:
        assert model.norm_position == "post" and not model.mlp_bias, "no class of transformers"
        tokens = dict.fromkeys(("pad_token_id", "eos_token_id"))  # the defaults are not in a small vocabulary
        return Olmo2Config(**shape, **tokens)
    return LlamaConfig(**shape, mlp_bias=model.mlp_bias)


def reference_model(model: Model, seed: int = 0) -> LlamaForCausalLM | Olmo2ForCausalLM:
    """Random weights, gains and biases included, in fp32."""
    torch.manual_seed(seed)
    config = reference_config(model)
    reference = (Olmo2ForCausalLM if isinstance(config, Olmo2Config) else LlamaForCausalLM)(config).float()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return reference
