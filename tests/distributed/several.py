"""``megagap.train`` of one layout after another in the same processes: ``python -m tests.distributed.several RECIPE``.

``layouts.json`` beside the recipe has each layout's overrides by the name of its run, a folder there too.
"""

if __name__ == "__main__":
    from megagap.process.parent import end_with_parent

    end_with_parent()

import json
import sys
from pathlib import Path

from megagap.process import launch
from megagap.process.rendezvous import Process
from tests.training_run import train_recipe


def train_layouts(recipe: Path) -> None:
    process = Process.from_environment()
    with launch.orderly_exit(process):
        launch.start(process)
        for name, overrides in json.loads(recipe.with_name("layouts.json").read_text()).items():
            overrides += [f"run.dir={recipe.with_name(name)}"]
            train_recipe(process.rank, process.world_size, recipe, overrides)


if __name__ == "__main__":
    train_layouts(Path(sys.argv[1]))
