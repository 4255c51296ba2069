"""Ranks that were started with different settings or code are told, before anything waits for them in vain."""

import os
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import HashStore

from megagap.config import load_recipe
from megagap.process.agreement import compare, exchange, explain, facts
from tests.launching import SECONDS, free_port
from tests.recipes import write_recipe
from tests.warm_start import python


def agree(*ranks: dict[str, Any]) -> list[list[Any]]:
    """What every rank finds, of ranks with these facts."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=SECONDS))
    found: list[Any] = [None] * len(ranks)

    def run(rank: int) -> None:
        found[rank] = exchange(ranks[rank], rank, len(ranks), store)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_are_alike_find_nothing():
    assert agree({"a": 1}, {"a": 1}, {"a": 1}) == [[], [], []]


def test_every_rank_learns_what_differs_and_where():
    one, other = {"train.seed": 7, "torch": "2"}, {"train.seed": 8, "torch": "2"}
    found = agree(one, other, one, other)
    assert found == [[(1, {"train.seed": (7, 8)}), (3, {"train.seed": (7, 8)})]] * 4
    message = explain(found[0], 4)
    assert "2 of 4 ranks differ from rank 0" in message
    assert "train.seed: 7 on rank 0, 8 on ranks 1, 3" in message


def test_a_setting_that_only_one_rank_has_is_a_difference():
    assert compare({"a": 1}, {"a": 1, "b": None, "c": 2}) == {"c": (None, 2)}


def test_rank_0_that_differs_from_all_others_is_shown_with_them():
    (found, *_) = agree({"x": 1}, {"x": 2}, {"x": 2})
    assert "x: 1 on rank 0, 2 on ranks 1, 2" in explain(found, 3)


def test_data_in_another_place_under_the_same_name_is_no_difference(tmp_path):
    recipes = [write_recipe(folder) for folder in (tmp_path / "a", tmp_path / "b") if folder.mkdir() is None]
    first, second = (facts(load_recipe(recipe, ["run.dir=/run"])) for recipe in recipes)
    assert compare(first, second) == {}
    moved = facts(load_recipe(recipes[1], ["run.dir=/run", 'data.sources=[{path = "fr_text_document"}]']))
    assert any(name.startswith("data.sources") for name in compare(first, moved))


def start(recipe: Path, rank: int, port: int, *overrides: str, **environment: str) -> "subprocess.Popen[str]":
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return subprocess.Popen(
        [python(), "-m", "megagap.train", str(recipe), *overrides],
        env=os.environ
        | {name: str(value) for name, value in place.items()}
        | {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
        | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_real_processes_with_different_layouts_and_kernels_end_with_exit_code_2(tmp_path):
    """Their groups would not have the same members: without the comparison they hang."""
    recipe, port = write_recipe(tmp_path), free_port()
    processes = [
        start(recipe, 0, port, "--parallel.tp", "2"),
        start(recipe, 1, port, "--parallel.pp", "2", "--train.seed", "9", MEGAGAP_OPS="plain"),
    ]
    for process in processes:
        _, message = process.communicate(timeout=SECONDS)
        assert process.returncode == 2, message
        assert "Traceback" not in message
        for line in (
            "1 of 2 ranks differs from rank 0",
            "parallel.tp: 2 on rank 0, 1 on rank 1",
            "parallel.pp: 1 on rank 0, 2 on rank 1",
            "train.seed: 7 on rank 0, 9 on rank 1",
            'environment MEGAGAP_OPS: unset on rank 0, "plain" on rank 1',
        ):
            assert line in message
    assert not (tmp_path / "run").exists()
