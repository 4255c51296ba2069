"""Check a recipe and print its run directory: ``run_folder.py RECIPE.toml [--section.key value ...]``."""

import sys

from megagap.checkpoint import find_model
from megagap.config import load_recipe, parse_overrides
from megagap.errors import ConfigError, run_tool


def main() -> None:
    if len(sys.argv) < 2:
        raise ConfigError("no recipe given\n  usage: sbatch examples/slurm/train.sbatch RECIPE.toml ...")
    recipe, *overrides = sys.argv[1:]
    print(load_recipe(recipe, parse_overrides(overrides), find_model=find_model).run.dir)


if __name__ == "__main__":
    run_tool(main)
