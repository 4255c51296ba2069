"""Tables of cosines and sines for rotary position embeddings (Su et al. 2021), in fp32 whatever the model's dtype."""

import math

import torch
from torch import Tensor

from megagap.config import Model, RopeScaling


def rotary_tables(model: Model, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim] in the half-split convention of ``transformers`` (both halves repeat)."""
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, inverse_frequencies(model).to(device))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def inverse_frequencies(model: Model) -> Tensor:
    """Radians per position for each of the head_dim / 2 pairs (``inv_freq``), [head_dim / 2] fp32."""
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.int64).float() / model.head_dim
    frequencies = 1.0 / (model.rope_theta**exponents)
    return frequencies if model.rope_scaling is None else _stretch(frequencies, model.rope_scaling)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's scaling: low frequencies are divided by ``factor``, high ones kept, those between interpolated.

    Source: Grattafiori et al. 2024 (Llama 3), section 3.4, in the form of Meta's reference code.
    """
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (turns - low) / (high - low)
    between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = torch.where(turns < low, frequencies / scaling.factor, frequencies)
    return torch.where((turns >= low) & (turns <= high), between, scaled)
