from pathlib import Path

import pytest
import tomli_w

from tests.config.good import GOOD


@pytest.fixture
def recipe(tmp_path):
    def write(**changes) -> Path:
        tree = {section: dict(settings) for section, settings in GOOD.items()}
        for name, value in changes.items():
            section, key = name.split("__")
            tree.setdefault(section, {})[key] = value
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(tree))
        return path

    return write
