"""A checkpoint as a Hugging Face model: ``config.json``, safetensors shards, tokenizer. The way back is in
``huggingface_import``.

megagap's tensors have Hugging Face's names and its rotary embedding is the half-split one of ``transformers``, so
weights are copied as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from megagap.checkpoint.companions import (
    CONFIG,
    GENERATION_CONFIG,
    companions_of,
    copy_tokenizer,
    recorded_tokenizer,
    warn_of_other_ids,
    write_json,
)
from megagap.checkpoint.huggingface_config import hugging_face_config, hugging_face_name, require_architecture
from megagap.checkpoint.index import Index
from megagap.checkpoint.load import load_tensor
from megagap.checkpoint.model import stored_dtype
from megagap.checkpoint.output import new_folder, require_new
from megagap.checkpoint.state import check_tensors, read_ids, read_model
from megagap.data.agreement import Ids, too_large
from megagap.errors import CheckpointError, DataError
from megagap.files import written_by_library
from megagap.model.shapes import is_norm_gain
from megagap.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Element types that a model can be exported in, by their names in ``config.json``."""

DEFAULT_SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    dtype: str
    parameters: int
    files: tuple[str, ...]
    """Safetensors files, in order."""
    size: int
    """Bytes of all tensors."""
    tokenizer: str | None
    """Where the tokenizer came from; None if none was exported."""


def export(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write the weights of a checkpoint folder as a model that ``transformers`` loads.

    ``dtype``: a key of :data:`DTYPES`; None means float32 for runs in fp32, bfloat16 for others, and the stored one for
    weights that no run has trained.
    ``tokenizer``: a tokenizer's folder or file; None means the one the run was trained with, if it is still there.
    ``max_shard_size``: bytes of a safetensors file, which only a single larger tensor exceeds; one file at a time is
    held in memory. ``progress`` is called with the bytes done and their total.
    ``output`` appears when complete, and must not exist or be empty.
    Raises :class:`CheckpointError` if the checkpoint is damaged or not such a model, or ``output`` cannot be written;
    :class:`DataError` if the tokenizer cannot be read or does not fit.
    """
    require_new(output)  # before spending time
    index = Index.read(checkpoint)
    model = read_model(checkpoint, index)
    require_architecture(model)
    names = check_tensors(checkpoint, index, model)
    dtype = dtype or _default_dtype(checkpoint, index)
    source = tokenizer or recorded_tokenizer(index)
    loaded = load_tokenizer(source) if source else None
    if loaded is not None and (complaint := too_large(Ids.of_tokenizer(loaded), model.vocab_size)):
        raise DataError(
            f"{complaint.partition(chr(10))[0]}\n  give the tokenizer that the model was trained with, or train it on "
            f"with model.vocab_size = {loaded.vocab_size}, which adds rows."
        )
    companions = companions_of(checkpoint, index, source, loaded)
    if loaded is not None:
        warn_of_other_ids(read_ids(checkpoint, index), loaded, model.vocab_size, companions)

    shards = plan_shards(names, DTYPES[dtype].itemsize, max_shard_size)
    total = sum(prod(shape) for shape in names.values()) * DTYPES[dtype].itemsize
    with new_folder(output) as partial:
        done = 0
        for file, members in shards.items():
            tensors = {}
            for name in members:
                tensor = _convert(checkpoint, index, name, DTYPES[dtype], model.norm_gain_scale)
                tensors[hugging_face_name(name, model)] = tensor
                done += prod(names[name]) * DTYPES[dtype].itemsize
                progress(done, total)
            with written_by_library(partial / file, CheckpointError, shown=output / file) as path:
                save_file(tensors, path, metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {hugging_face_name(name, model): file for file, members in shards.items() for name in members}
            listing = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", listing)
        write_json(partial / CONFIG, hugging_face_config(model, dtype, companions))
        if not model.headless:  # which generates nothing
            write_json(partial / GENERATION_CONFIG, companions.generation)
        if source and loaded is not None:
            copy_tokenizer(source, loaded, model.max_position_embeddings, partial)
    return Exported(dtype, total // DTYPES[dtype].itemsize, tuple(shards), total, source)


def plan_shards(tensors: dict[str, tuple[int, ...]], itemsize: int, max_size: int) -> dict[str, list[str]]:
    """Tensor names by file, filled in order up to ``max_size`` bytes."""
    groups: list[list[str]] = []
    room = 0
    for name, shape in tensors.items():
        size = prod(shape) * itemsize
        if size > room or not groups:
            groups.append([])
            room = max_size
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _default_dtype(checkpoint: Path, index: Index) -> str:
    train = index.state.get("train")
    precision = train.get("precision") if isinstance(train, dict) else None
    if precision is None:
        stored = stored_dtype(checkpoint, index)
        return next((name for name, dtype in DTYPES.items() if dtype == stored), "float32")
    return "float32" if precision == "fp32" else "bfloat16"


def _convert(checkpoint: Path, index: Index, name: str, dtype: torch.dtype, gain_scale: float) -> torch.Tensor:
    """A tensor as Hugging Face's model has it: norms with their scale in the gain."""
    stored = load_tensor(checkpoint, index, "weight", name)
    if not stored.isfinite().all():
        raise CheckpointError(
            f"{checkpoint}: {name} has values that are not finite: the run that wrote it had diverged\n"
            "  export an earlier checkpoint."
        )
    tensor = stored.to(dtype)
    if is_norm_gain(name) and gain_scale != 1:
        tensor = (tensor.float() * gain_scale).to(dtype)  # cast before scaling, as the model does
    if not tensor.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} has values that {kind} cannot hold\n  export with --dtype float32 (or bfloat16)."
        )
    return tensor
