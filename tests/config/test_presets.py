"""Presets have the published shapes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megagap.config import describe_settings, load_recipe
from megagap.config.presets import presets
from megagap.model.shapes import model_tensors, parameter_count
from tests.config.good import faults_of
from tests.huggingface import reference_config


@pytest.mark.parametrize(
    ("preset", "overrides", "parameters"),
    [
        ("gaperon-1b", [], 1_498_482_688),
        ("gaperon-1b", ["model.tie_word_embeddings=true"], 1_235_814_400),
        ("llama3.2-1b", [], 1_235_814_400),
        ("llama3-8b", [], 8_030_261_248),
        ("llama3.1-8b", [], 8_030_261_248),
        ("llama3.1-70b", [], 70_553_706_496),
        ("llama3.2-3b", [], 3_212_749_824),
        ("gaperon-8b", [], 8_030_261_248),
        ("gaperon-24b", [], 23_543_772_160),
    ],
)
def test_presets_have_the_published_parameter_counts(recipe, preset, overrides, parameters):
    model = load_recipe(recipe(model__preset=preset), overrides).model
    assert parameter_count(model) == parameters


@pytest.mark.parametrize("preset", [name for name in presets() if name.startswith("llama")])
def test_presets_have_the_shapes_that_transformers_builds(recipe, preset):
    model = load_recipe(recipe(model__preset=preset)).model
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(reference_config(model))
    tied = {"lm_head.weight"} if model.tie_word_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items() if name not in tied}
    assert shapes == model_tensors(model)


SCALED = {"llama3.1-8b": 8.0, "llama3.1-70b": 8.0, "llama3.2-1b": 32.0, "llama3.2-3b": 32.0}


@pytest.mark.parametrize("preset", presets())
def test_presets_have_the_published_wavelengths_lengths_and_ties(recipe, preset):
    model = load_recipe(recipe(model__preset=preset)).model
    assert (model.rope_scaling.factor if model.rope_scaling else None) == SCALED.get(preset)
    assert model.tie_word_embeddings == preset.startswith("llama3.2")
    if model.rope_scaling:
        bands = (model.rope_scaling.low_freq_factor, model.rope_scaling.high_freq_factor)
        assert (*bands, model.rope_scaling.original_max_position_embeddings) == (1.0, 4.0, 8192)
        assert (model.max_position_embeddings, model.rope_theta) == (131072, 500000.0)


def test_help_and_errors_name_every_preset(recipe):
    told = [describe_settings(200), faults_of(recipe(model__preset="llama9"))]
    assert all(preset in text for preset in presets() for text in told)
