"""Names and shapes of a model's parameters, as ``transformers``' ``LlamaForCausalLM`` has them."""

from math import prod

import torch

from megagap.config import Model
from megagap.model.llama import build_whole


def parameter_count(model: Model) -> int:
    """All parameters, without padding; a tied embedding counts once."""
    return sum(prod(shape) for shape in model_tensors(model).values())


def is_norm_gain(name: str) -> bool:
    """Whether the parameter is the gain of an RMSNorm."""
    return name.endswith("norm.weight")


def vocabulary_tensors(model: Model) -> tuple[str, ...]:
    """Names of the parameters that have a row for each token id."""
    return ("model.embed_tokens.weight", *(() if model.tie_word_embeddings else ("lm_head.weight",)))


def layer_of(name: str) -> str:
    """What the parameter belongs to: a layer (``layers.3``), ``embed_tokens``, the last ``norm`` or ``lm_head``."""
    kind, number = name.removeprefix("model.").split(".")[:2]
    return f"layers.{number}" if kind == "layers" else kind


def model_tensors(model: Model) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter by name, in the order of the forward pass: those of the model itself, which is
    built without storage."""
    stage = build_whole(model, device=torch.device("meta"))
    return {parameter.shard.name: parameter.shard.shape for parameter in stage.sharded_parameters()}
