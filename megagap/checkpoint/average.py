"""The weighted mean of several checkpoints' weights, as a checkpoint to start from or to export.

Averaging the ends of cooldowns that branch off one run, or late checkpoints of one of them, often gives a better model
than each of them (Izmailov et al. 2018; Wortsman et al. 2022).
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagap.checkpoint.index import Index
from megagap.checkpoint.load import load_slices
from megagap.checkpoint.output import require_new
from megagap.checkpoint.save import save_checkpoint
from megagap.checkpoint.state import check_tensors, read_ids, read_model, state_of_model
from megagap.config import Model
from megagap.errors import CheckpointError
from megagap.files import file_errors
from megagap.ops.wide import wide_dtype
from megagap.parallel.shard import Slice, whole

PIECE = 2**24
"""Elements that are averaged at a time: 128 MB of sums in float64."""

CARRIED = ("hugging_face", "ids")
"""Fields of the first checkpoint's state that hold for the average, too, beside its model and tokenizer."""


@dataclass(frozen=True)
class Averaged:
    """What an average has written."""

    parameters: int
    shares: tuple[float, ...]
    """Of each checkpoint, in order; their sum is 1."""


def average_checkpoints(
    checkpoints: Sequence[Path],
    output: Path,
    weights: Sequence[float] | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Averaged:
    """Write the mean of the ``checkpoints``' weights as the checkpoint ``output``, which is at step 0 of no run.

    ``weights``: of each checkpoint, relative to their sum; None: all alike. Sums are made in float64 and rounded to the
    dtype that is stored, of several the widest. ``progress`` is called with the bytes done and their total.
    ``output`` appears when whole, and must not exist or be empty.
    Raises :class:`CheckpointError` if a checkpoint is damaged, or of another model or vocabulary than the first, if a
    weight is not above 0, or ``output`` cannot be written.
    """
    require_new(output)
    shares = shares_of(checkpoints, weights)
    indexes = [Index.read(folder) for folder in checkpoints]
    models = [read_model(folder, index) for folder, index in zip(checkpoints, indexes, strict=True)]
    for folder, index, model in zip(checkpoints, indexes, models, strict=True):
        _refuse_another(folder, index, model, checkpoints[0], indexes[0], models[0])
    shapes = check_tensors(checkpoints[0], indexes[0], models[0])
    sources = list(zip(checkpoints, indexes, shares, strict=True))
    dtypes = {name: _widest(sources, name) for name in shapes}
    total = sum(prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())
    done = 0

    def written(size: int) -> None:
        nonlocal done
        done += size
        progress(done, 2 * total)  # all are averaged first, then written

    def slices() -> Iterator[Slice]:
        for name, shape in shapes.items():
            elements = prod(shape)
            with file_errors(f"cannot write {output}", output, CheckpointError):
                mean = _mapped(output.absolute().parent, elements, dtypes[name])
            for start in range(0, elements, PIECE):
                stop = min(start + PIECE, elements)
                mean[start:stop] = _mean(sources, name, shape, start, stop)
                written((stop - start) * mean.itemsize)
            yield Slice("weight", whole(name, shape), 0, elements, mean)

    save_checkpoint(output, slices(), _state(checkpoints, indexes[0], models[0], shares), progress=written)
    return Averaged(sum(map(prod, shapes.values())), shares)


def shares_of(checkpoints: Sequence[Path], weights: Sequence[float] | None) -> tuple[float, ...]:
    """Each checkpoint's share of the mean. Raises :class:`CheckpointError` as :func:`average_checkpoints` does."""
    weights = [1.0] * len(checkpoints) if weights is None else list(weights)
    if len(weights) != len(checkpoints):
        raise CheckpointError(f"{len(weights)} weights for {len(checkpoints)} checkpoints\n  give one for each.")
    for folder, weight in zip(checkpoints, weights, strict=True):
        if not (isfinite(weight) and weight > 0):
            raise CheckpointError(f"the weight {weight:g} of {folder} is not above 0\n  leave that checkpoint out.")
    return tuple(weight / fsum(weights) for weight in weights)


def _refuse_another(
    folder: Path, index: Index, model: Model, first: Path, first_index: Index, first_model: Model
) -> None:
    ours, theirs = model.model_dump(), first_model.model_dump()
    for name in sorted(ours.keys() - {"preset", "initializer_range", "max_position_embeddings"}):
        if ours[name] != theirs[name]:
            raise CheckpointError(
                f"{folder} is of another model than {first}: model.{name} = {ours[name]}, there {theirs[name]}\n"
                "  only checkpoints of one model can be averaged."
            )
    here, there = read_ids(folder, index), read_ids(first, first_index)
    if here is not None and there is not None and here.fingerprint != there.fingerprint:
        raise CheckpointError(
            f"{folder} was trained with another vocabulary than {first}: the same ids are other tokens\n"
            "  only checkpoints of one vocabulary can be averaged."
        )


_Sources = Sequence[tuple[Path, Index, float]]


def _widest(sources: _Sources, name: str) -> torch.dtype:
    """fp32 at least: neighbours in bf16 mostly differ by one unit, and their mean would be rounded to one of them."""
    dtypes = [index.tensor(folder, "weight", name).torch_dtype for folder, index, _ in sources]
    return wide_dtype(max(dtypes, key=lambda dtype: dtype.itemsize))


def _mapped(folder: Path, elements: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a file without a name, so that a model need not fit in memory."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(elements * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=elements, dtype=dtype)


def _mean(sources: _Sources, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Elements ``[start, stop)`` of the mean, float64."""
    total = torch.zeros(stop - start, dtype=torch.float64)
    for folder, index, share in sources:
        part = torch.empty(stop - start, dtype=index.tensor(folder, "weight", name).torch_dtype)
        load_slices(folder, index, [Slice("weight", whole(name, shape), start, stop, part)])
        if not part.isfinite().all():
            raise CheckpointError(
                f"{folder}: {name} has values that are not finite: the run that wrote it had diverged\n"
                "  average others."
            )
        total.add_(part.double(), alpha=share)
    return total


def _state(checkpoints: Sequence[Path], index: Index, model: Model, shares: Sequence[float]) -> dict[str, Any]:
    data = index.state.get("data")
    tokenizer = data.get("tokenizer") if isinstance(data, dict) else None
    return {
        **state_of_model(model, tokenizer),
        **{field: index.state[field] for field in CARRIED if field in index.state},
        "average_of": [
            {"checkpoint": str(folder.absolute()), "share": share}
            for folder, share in zip(checkpoints, shares, strict=True)
        ],
    }
