"""What listens to the spans of a run: recordings, the ledger of its time, the measurement of slow ranks."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from megagap.config import Settings
from megagap.errors import DataError
from megagap.observe.goodput import Goodput, accounted
from megagap.observe.pace import Pace
from megagap.observe.run_directory import RunDirectory
from megagap.observe.spans import clock_of, recorded_spans
from megagap.parallel.mesh import Mesh

log = logging.getLogger(__name__)


@contextmanager
def observed(settings: Settings, run: RunDirectory, mesh: Mesh, first_step: int) -> Iterator[Pace | None]:
    """Let what the settings ask for listen to the block's spans; its end is logged with the run's goodput.

    Yields what measures this rank's own time, if anything does. Raises :class:`DataError` if a file cannot be written.
    """
    every = settings.run.slow_ranks_every if mesh.world.size > 1 else 0
    pace = Pace(every, mesh, clock_of(mesh)) if every else None
    with ExitStack() as stack:
        stack.enter_context(recorded_spans(settings, run.path, mesh, first_step))
        if run.is_writer:
            stack.enter_context(mesh.spans.heard_by(stack.enter_context(accounted(run.path, first_step))))
        if pace is not None:
            stack.enter_context(mesh.spans.heard_by(pace))
        yield pace
    if run.is_writer:
        try:
            log.info("%s", Goodput.of_run(run.path).line())
        except DataError as error:  # a run that has ended well does not fail for a report
            log.warning("no goodput: %s", error.args[0])
