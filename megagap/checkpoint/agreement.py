"""All ranks learn what one of them finds wrong with a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from megagap.checkpoint.index import DamagedCheckpointError
from megagap.errors import MegagapError
from megagap.parallel.communicator import Communicator


@contextmanager
def raised_by_all(communicator: Communicator) -> Iterator[None]:
    """What one rank finds wrong in the block, all ranks raise at its end: none waits for another that has left.

    Of several faults it is the first rank's; what cannot be cured by an older checkpoint goes first.
    """
    fault: MegagapError | None = None
    try:
        yield
    except MegagapError as error:
        fault = error
    gathered = cast("list[MegagapError | None] | None", communicator.gather(fault))
    faults = sorted(filter(None, gathered or ()), key=lambda error: isinstance(error, DamagedCheckpointError))
    first = communicator.broadcast(faults[0] if faults else None)
    if first is not None:
        raise cast(MegagapError, first)
