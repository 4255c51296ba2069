"""Trains a recipe inside a test's own processes, as ``python -m megagap.train`` does."""

from pathlib import Path
from typing import Any

import torch

from megagap.checkpoint import find_model
from megagap.config import load_recipe
from megagap.observe.logs import log_to
from megagap.observe.metrics import read_metrics
from megagap.observe.run_directory import RunDirectory
from megagap.process.rendezvous import Process
from megagap.training.mesh import make_mesh
from megagap.training.trainer import train


def train_recipe(rank: int, ranks: int, recipe: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """To be run by :class:`tests.workers.Workers`; returns the metrics on rank 0."""
    settings = load_recipe(recipe, overrides, ranks, find_model=find_model)
    mesh = make_mesh(settings, Process(rank, ranks, rank, ranks), torch.device("cpu"))
    run = RunDirectory(Path(settings.run.dir), is_writer=rank == 0)
    run.open()
    log_to(run.path / "logs", rank)
    train(settings, mesh, run)
    run.close()
    return read_metrics(run.metrics) if rank == 0 else []
