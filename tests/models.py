"""The shape of a tiny model, and variants of it."""

from typing import Any

from megagap.config import Model, RopeScaling

SHAPE: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=61,
    max_position_embeddings=64,
)
SCALING = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
"""Llama 3.1's, of a model that was first trained on sequences of 16."""


def tiny_model(**changes: Any) -> Model:
    return Model(**(SHAPE | changes))
