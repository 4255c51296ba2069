"""What a training step holds on real processes, to be compared with the formula.

Measured are the bytes of all storages that torch's operations have made and that are still referred to, in the
trainer's own step. Not the process's resident size: that counts the interpreter and libraries, some hundred MB, and
what the C library keeps of freed memory, whatever the layout. Nor buffers of the communication library, as the formula:
gloo copies what it reduces and scatters, NCCL has buffers of its own.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import tomli_w
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megagap.benchmark.step import first_step, random_batch
from megagap.config import Settings, load_recipe, parse_overrides
from megagap.parallel import opaque
from megagap.planning.devices import load_device
from megagap.planning.memory import RankMemory, memory_by_stage
from megagap.planning.recording import Memory
from megagap.process.rendezvous import Process
from megagap.training import trainer
from megagap.training.mesh import make_mesh
from megagap.training.step import train_step

# Large enough that the activations of the model, not small tensors, decide.
SMALL: dict[str, Any] = {
    "model": {
        "preset": "tiny",
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 704,
        "vocab_size": 4096,
    },
    "train": {"steps": 10, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 512},
}


def settings_of(folder: Path, ranks: int, changes: dict[str, Any], base: dict[str, Any] = SMALL) -> Settings:
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps(base))
    overrides = [f"--{name}={str(value).lower()}" for name, value in changes.items()]
    return load_recipe(recipe, parse_overrides(overrides), ranks, needs_data=False)


TRIES = 3
"""A thread of gloo's lets go of what it has sent when it is scheduled again, which on a busy machine may be some
operations after the wait for it: a rank may seem to hold a tensor more than it does, never less."""

ACTIVATIONS_WITHIN, TOTAL_WITHIN = 0.05, 0.02
"""The shares by which the formula may be off."""


class Measured(NamedTuple):
    """Bytes of one rank."""

    static: int
    """Live between steps: parameters, gradients, the optimizer's state."""
    peak: int
    """The most within a step."""

    @property
    def activations(self) -> int:
        """What the step holds besides at its fullest moment."""
        return self.peak - self.static


class Compared(NamedTuple):
    """One rank's memory as it was measured, and by the formula."""

    measured: Measured
    formula: RankMemory

    @property
    def activations(self) -> float:
        """The formula over the measurement, without what is kept between steps."""
        return (self.formula.total - self.formula.static) / self.measured.activations

    @property
    def total(self) -> float:
        return self.formula.total / self.measured.peak

    @property
    def holds_more(self) -> bool:
        """Than the formula says, by more than it may be off."""
        return self.activations < 1 - ACTIVATIONS_WITHIN or self.total < 1 - TOTAL_WITHIN


class LiveStorages(TorchDispatchMode):
    """Follows every storage that an operation returns until nothing refers to it."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Layers are compiled nevertheless, and what their graphs run is seen."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # A storage that is first seen in a view was made by no operation: it is gloo's.
        makes_views = any(returned.alias_info is not None for returned in function._schema.returns)
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and (not makes_views or self.memory.has_seen(tensor)):
                self.memory.see(tensor)
        return result


def measure(rank: int, ranks: int, settings: Settings) -> Measured:
    """One step of the trainer's in this process, one of ``ranks``."""
    return _measure(rank, ranks, settings, LiveStorages())


def _measure(rank: int, ranks: int, settings: Settings, storages: LiveStorages) -> Measured:
    mesh = make_mesh(settings, Process(rank, ranks, rank, ranks), torch.device("cpu"))
    with storages:
        state = trainer.build_state(settings, mesh)
        static = storages.memory.live
        batch = random_batch(settings, mesh, first_step(settings))
        storages.memory.peak = storages.memory.live
        train_step(state, batch, lambda: (False, False))
    return Measured(static, storages.memory.peak)


def measure_graphs(rank: int, ranks: int, settings: Settings) -> Measured:
    """:func:`measure` of compiled layers, whose graphs run as they are: what a compiler makes of them is not seen."""
    graphs_only = partial(trainer.compile_layers, backend="aot_eager")
    kept, storages = opaque._kept, LiveStorages()

    def followed(*arguments: Any) -> list[torch.Tensor]:
        """Of an operation only results are seen, but these copies outlive it, too."""
        tensors = kept(*arguments)
        for tensor in tensors:
            storages.memory.see(tensor)
        return tensors

    with patch.object(trainer, "compile_layers", graphs_only), patch.object(opaque, "_kept", followed):
        return _measure(rank, ranks, settings, storages)


def compare(workers: Any, settings: Settings, ranks: int, measure: Callable[..., Measured] = measure) -> list[Compared]:
    """Every rank of a layout, measured again where one holds more than the formula says. ``workers``: the pool of
    processes."""
    stages = memory_by_stage(settings, load_device("cpu"), ranks)
    formulas = [next(stage for stage in stages if rank in stage.ranks) for rank in range(ranks)]
    tries = []
    for _ in range(TRIES):
        tries.append(workers.run(ranks, measure, settings))
        least = [Measured(*map(min, zip(*of_rank, strict=True))) for of_rank in zip(*tries, strict=True)]
        compared = [Compared(*pair) for pair in zip(least, formulas, strict=True)]
        if not any(rank.holds_more for rank in compared):
            break
    return compared
