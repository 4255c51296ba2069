"""The one formula for a model's floating-point operations per token."""

from dataclasses import dataclass

from megagap.config import Model
from megagap.config.settings import FlopParts


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward and backward operations for one token, without recomputation and vocabulary padding."""

    full: int
    """Counting the full attention matrix, as most systems report it."""
    causal: int
    """Counting only the causal half of it, which is all that causal attention needs."""


def flops_per_token(model: Model, sequence_length: int) -> FlopsPerToken:
    """6 operations for each matrix weight (2 forward, 4 backward; Kaplan et al. 2020, section 2.1) and attention's
    12 · layers · query width · sequence (Narayanan et al. 2021, appendix), halved where the causal half is counted. A
    headless model has, in place of the output projection, products of each token with all targets of its sequence."""
    parts = FlopParts.of(model)
    matrices = 6 * model.num_hidden_layers * parts.layer_weights + parts.head(sequence_length)
    square = model.num_hidden_layers * parts.layer_square(sequence_length)
    return FlopsPerToken(full=matrices + square, causal=matrices + square // 2)
