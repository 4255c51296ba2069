"""FLOPs of a token."""

from megagap.config import Model
from megagap.config.presets import presets
from megagap.model.flops import flops_per_token

TINY = presets()["tiny"]
"""hidden 64, 4 layers, q 64, kv 32, ffn 176, vocabulary 512."""


def test_flops_per_token_follow_the_formula_by_hand():
    """64 tokens."""
    flops = flops_per_token(Model(**TINY), 64)
    matrices = 6 * (4 * (64 * (64 + 64) + 64 * 64 + 3 * 64 * 176) + 64 * 512)
    assert flops.full == matrices + 12 * 4 * 64 * 64
    assert flops.causal == matrices + 6 * 4 * 64 * 64


def test_a_headless_model_computes_a_score_for_each_token_of_the_sequence_and_no_logits():
    models = Model(**TINY), Model(**TINY, tie_word_embeddings=True, headless=True)
    whole, headless = (flops_per_token(model, 48) for model in models)
    assert whole.full - headless.full == whole.causal - headless.causal == 6 * 64 * (512 - 48)
