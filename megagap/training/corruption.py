"""Ends a run in which ranks that must hold the same parameters do not, before a checkpoint takes them."""

from collections.abc import Sequence

from megagap.errors import CorruptionError, ranks_named
from megagap.observe.run_directory import RunDirectory
from megagap.optim.replicas import OUTVOTED, TIED, differing_replicas
from megagap.parallel.collectives import all_reduce
from megagap.resume.next_start import next_start
from megagap.training.step import TrainState


def require_equal_replicas(state: TrainState, run: RunDirectory) -> None:
    """Compare the parameters as they are after ``state.step``. Collective; raises as :func:`require_equal` does."""
    with state.mesh.spans.span("comparison_of_replicas"):
        found = all_reduce(differing_replicas(state.optimizer.store), state.mesh.world).tolist()
    require_equal(found, state.step, run, state.settings.checkpoint.load)


def require_equal(found: Sequence[float], step: int, run: RunDirectory, load: str) -> None:
    """Raises :class:`CorruptionError` naming the ranks that :func:`differing_replicas` found at ``step``, of the whole
    world; on every rank alike. ``load``: the run's ``checkpoint.load``."""
    outvoted, tied = ([rank for rank, value in enumerate(found) if value == kind] for kind in (OUTVOTED, TIED))
    if not outvoted and not tied:
        return
    problems = []
    if outvoted:
        problems.append(f"parameters of {ranks_named(outvoted)} differ from those of most ranks that hold the same")
    if tied:
        problems.append(f"parameters of {ranks_named(tied)} differ; which are wrong cannot be told from so few")
    run.event("replicas_differ", ranks=[*outvoted, *tied])
    raise CorruptionError(
        f"in step {step} the {'; '.join(problems)}\n"
        "  their memory, or what computes or sends them, is faulty: take the machine out of service, or test it\n"
        f"  nothing was saved; {next_start(run, load)}."
    )
