"""The reference model: ``transformers``' Llama with the shape of a recipe's."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megagap.config import Model


def reference_config(model: Model) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= model.rope_scaling.model_dump()
    return LlamaConfig(
        **{
            name: getattr(model, name)
            for name in [
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
                "mlp_bias",
            ]
        },
        rope_parameters=rope,
        attn_implementation="eager",
    )


def reference_model(model: Model, seed: int = 0) -> LlamaForCausalLM:
    """Random weights, gains and biases included, in fp32."""
    torch.manual_seed(seed)
    reference = LlamaForCausalLM(reference_config(model)).float()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return reference
