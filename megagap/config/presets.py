"""The published shapes that ``model.preset`` names: ``model/presets.toml``."""

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def presets() -> dict[str, dict[str, Any]]:
    """The settings of each preset, by name."""
    return tomllib.loads(files("megagap.model").joinpath("presets.toml").read_text(encoding="utf-8"))
