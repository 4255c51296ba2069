"""Tiny recipes and data for tests that train."""

from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from megagap.data.indexed import IndexedDatasetWriter

VOCABULARY = 509
"""A prime: no tp divides it."""


def write_tokens(prefix: Path, seed: int, documents: int = 60, vocabulary: int = VOCABULARY) -> None:
    """Documents of random lengths whose tokens follow a simple rule with noise, so that a model can learn."""
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(str(prefix), np.dtype("uint16")) as writer:
        for _ in range(documents):
            length = int(generator.integers(5, 120))
            tokens = (generator.integers(vocabulary) + (3 + seed) * np.arange(length)) % vocabulary
            noise = generator.random(length) < 0.1
            writer.add_document(np.where(noise, generator.integers(vocabulary, size=length), tokens))


def write_recipe(folder: Path, **changes: dict[str, Any]) -> Path:
    """``folder/recipe.toml`` on two sources, for 10 steps; ``changes`` by section."""
    for seed, name in enumerate(("fr", "en")):
        prefix = folder / f"{name}_text_document"
        if not prefix.with_suffix(".idx").exists():
            write_tokens(prefix, seed)
    recipe: dict[str, Any] = {
        "model": {"preset": "tiny", "vocab_size": VOCABULARY, "num_hidden_layers": 5},
        "parallel": {},
        "data": {
            "sources": [
                {"path": "fr_text_document", "weight": 0.7},
                {"path": "en_text_document", "weight": 0.3},
            ],
            "split": "90,10,0",
        },
        "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 32, "seed": 7},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "checkpoint": {},
        "guard": {},
        "run": {"dir": str(folder / "run"), "tensorboard": False},
    }
    for section, settings in changes.items():
        recipe[section] = recipe[section] | settings
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    return path
