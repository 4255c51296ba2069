"""The grid of processes that a recipe asks for."""

import torch

from megagap.config import Settings
from megagap.parallel.layout import Layout
from megagap.parallel.mesh import Mesh
from megagap.process import launch
from megagap.process.rendezvous import Process


def make_mesh(settings: Settings, process: Process, device: torch.device) -> Mesh:
    """Make the groups of this process. Collective."""
    return Mesh.of(
        make_layout(settings, process.world_size),
        process.rank,
        device,
        launch.group_timeout(settings.run.hang_seconds),
        background=settings.checkpoint.in_background,
    )


def make_layout(settings: Settings, world_size: int) -> Layout:
    """Where so many ranks stand."""
    parallel = settings.parallel
    kv_sharing = max(1, parallel.tp // settings.model.num_key_value_heads)
    return Layout(
        world_size,
        pp=parallel.pp,
        cp=parallel.cp,
        tp=parallel.tp,
        kv_sharing=kv_sharing,
        dp_replicate=parallel.dp_replicate,
        embedding_ranks=settings.placement.embedding_ranks,
    )
