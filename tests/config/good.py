"""A recipe without faults, and what is said of others."""

import pytest

from megagap.config import load_recipe
from megagap.errors import ConfigError

GOOD = {
    "model": {"preset": "tiny"},
    "data": {"sources": [{"path": "fr_text_document"}]},
    "train": {"steps": 10, "global_batch_size": 8, "sequence_length": 64},
}


def faults_of(path, overrides=(), world_size=None) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(path, overrides, world_size)
    return str(error.value)
