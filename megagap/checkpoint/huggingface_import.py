"""A Hugging Face Llama, ``config.json`` and safetensors, as a checkpoint or directly as a model.

The folder is untrusted input: nothing is used of it before names, shapes and dtypes are found to fit its
``config.json``, and the safetensors library has checked its headers. Pickled weights are never opened.
"""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megagap.checkpoint.companions import CONFIG, read_companions, read_json, tokenizer_of, warn_of_other_ids
from megagap.checkpoint.huggingface_config import read_settings
from megagap.checkpoint.model import SingleProcessModel, build_model, widest
from megagap.checkpoint.output import require_new
from megagap.checkpoint.save import save_checkpoint
from megagap.checkpoint.state import state_of_model
from megagap.config import Model
from megagap.data.agreement import Ids
from megagap.errors import CheckpointError, DataError, library_errors
from megagap.files import file_errors, require_fetched
from megagap.model.shapes import model_tensors
from megagap.parallel.shard import Slice, whole
from megagap.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

SHARD_INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

READABLE = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that weights may have."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")  # a plain name: no path out of the folder


@dataclass(frozen=True)
class Imported:
    """What an import has written."""

    model: Model
    parameters: int
    dtypes: tuple[str, ...]
    """Element types of the weights, which are kept as they were, by torch's names."""
    size: int
    """Bytes of all weights."""
    tokenizer: str | None
    """The tokenizer's path as recorded in the checkpoint; None if the folder has none."""
    is_tokenizer_readable: bool


def import_model(
    folder: Path, output: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Imported:
    """Write the Hugging Face model in ``folder`` as the checkpoint ``output``: at step 0, its weights bit for bit.

    The files are memory-mapped, so that they need not fit in memory. ``progress`` is called with the bytes done and
    their total. ``output`` appears when whole, and must not exist or be empty.
    The tokenizer stays where it is; the checkpoint records its path.
    Raises :class:`CheckpointError` if ``folder`` is not a Llama that we can train, is damaged, or ``output`` cannot be
    written.
    """
    require_new(output)
    output = output.resolve()
    model, tensors = read_model_folder(folder)
    total = sum(tensor.nbytes for tensor in tensors.values())
    tokenizer, companions = tokenizer_of(folder), read_companions(folder)

    passes = 0

    def one_pass_over(size: int) -> None:
        nonlocal passes
        passes += size
        progress(passes // 2, total)  # every byte is checked first, then written

    def slices() -> Iterator[Slice]:
        for name, tensor in tensors.items():
            _check_finite(folder, name, tensor)
            yield Slice("weight", whole(name, tuple(tensor.shape)), 0, tensor.numel(), tensor.view(-1))
            one_pass_over(tensor.nbytes)

    state = state_of_model(model, tokenizer)
    loaded = _readable_tokenizer(tokenizer) if tokenizer else None
    if loaded:
        warn_of_other_ids(None, loaded, model.vocab_size, companions)
        state["ids"] = Ids.of_tokenizer(loaded).record()
    save_checkpoint(output, slices(), state | companions.state(), progress=one_pass_over)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    parameters = sum(map(torch.numel, tensors.values()))
    return Imported(model, parameters, tuple(sorted(dtypes)), total, tokenizer, loaded is not None)


def _readable_tokenizer(spec: str) -> Tokenizer | None:
    """The weights are of use without it, so one that cannot be read is a warning."""
    try:
        return load_tokenizer(spec)
    except DataError as error:
        log.warning("the tokenizer beside the model cannot be used: %s", error.args[0])
        return None


def load_hugging_face_model(folder: Path, device: torch.device | None = None) -> SingleProcessModel:
    """The model in ``folder``, in eval mode and in the dtype stored (the widest, if there are several).

    Raises :class:`CheckpointError` as :func:`import_model`.
    """
    settings, tensors = read_model_folder(folder)
    model = build_model(settings, widest(tensor.dtype for tensor in tensors.values()), device)
    with torch.no_grad():
        for parameter in model.stage.sharded_parameters():
            parameter.copy_(tensors[parameter.shard.name])
    return model


def is_hugging_face(folder: Path) -> bool:
    """Whether ``folder`` is meant to be a Hugging Face model."""
    return (folder / CONFIG).is_file()


def read_model_folder(folder: Path) -> tuple[Model, dict[str, Tensor]]:
    """Settings and weights: all of :func:`model_tensors`, in its order. Memory-mapped, not to be written to.

    Raises :class:`CheckpointError`.
    """
    model = read_settings(folder)
    stored = _read_tensors(folder)
    if model.num_hidden_layers > len(stored):
        raise CheckpointError(
            f"{folder / CONFIG}: num_hidden_layers = {model.num_hidden_layers}, but the folder has "
            f"{len(stored)} tensors in all\n  are files missing? Download the model again."
        )
    wanted = model_tensors(model)
    tensors = {}
    for name, shape in wanted.items():
        if name not in stored:
            raise CheckpointError(f"{folder} does not have {name}\n  are files missing? Download the model again.")
        tensor = tensors[name] = stored.pop(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(tensor.shape)}, {CONFIG} says {list(shape)}\n"
                "  the files do not belong together. Download the model again."
            )
        if tensor.dtype not in READABLE:
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in READABLE)
            raise CheckpointError(
                f"{folder}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}; only {dtypes} can be read\n"
                "  use the unquantised model."
            )
    _refuse_rest(folder, model, tensors, stored)
    return model, tensors


def _refuse_rest(folder: Path, model: Model, tensors: dict[str, Tensor], rest: dict[str, Tensor]) -> None:
    """Nothing may be left but redundant tensors that older versions of transformers wrote."""
    for name, tensor in rest.items():
        if name.endswith(".rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and model.tie_word_embeddings:
            embedding = tensors["model.embed_tokens.weight"]
            if tensor.dtype == embedding.dtype and torch.equal(tensor, embedding):
                continue
            raise CheckpointError(
                f"{folder / CONFIG}: tie_word_embeddings is true, but lm_head.weight differs from the embedding\n"
                "  set it to false to keep both."
            )
        raise CheckpointError(
            f"{folder} has {name}, which does not belong to a model as its {CONFIG} describes it\n"
            "  only plain Llama 2 and 3 and OLMo 2 models can be read."
        )


def _check_finite(folder: Path, name: str, tensor: Tensor) -> None:
    """The files carry no checksums: this finds at least the worst of what may have happened to them."""
    if not all(bound.isfinite() for bound in tensor.aminmax()):
        raise CheckpointError(f"{folder}: {name} has values that are not finite\n  download the model again.")


# -------------------------------------------------------------------------------------------------------- safetensors


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the model's files, memory-mapped."""
    if (folder / SINGLE_FILE).is_file():
        return _open_file(folder / SINGLE_FILE)
    if not (folder / SHARD_INDEX).is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{folder} has its weights in {pickled[0]}, a pickle, which can run code when opened: it is not read\n"
                "  save the model as safetensors: with transformers, model.save_pretrained(DIR)."
            )
        raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {SHARD_INDEX}\n  download the model again.")
    path = folder / SHARD_INDEX
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{path}: weight_map must name a file for each tensor")
    files = sorted(set(places.values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not _FILE_NAME.fullmatch(file):
            raise CheckpointError(f"{path}: weight_map names {file!r}, which is not a safetensors file in this folder")
        found = _open_file(folder / file)
        for name in found:
            if places.get(name) != file:
                raise CheckpointError(
                    f"{folder / file} has {name}, which {path.name} places in {places.get(name, 'no file')}\n"
                    "  the files do not belong together. Download the model again."
                )
        tensors |= found
    return tensors


def _open_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        if path.is_dir() or path.is_symlink():
            raise CheckpointError(f"{path} is not a file\n  download the model again.")
        raise CheckpointError(f"{path} is missing\n  download the model again.")
    require_fetched(path, CheckpointError)
    # Opened here, since the library says of a file without read permission that it does not exist; and it refuses names
    # that are not valid UTF-8, which the system's own name of an open file always is.
    with file_errors(f"cannot read {path}", path, CheckpointError):
        opened = path.open("rb")
    own = Path(f"/proc/self/fd/{opened.fileno()}")
    told = library_errors(f"{path} is not a complete safetensors file; download it again", CheckpointError)
    with opened, told, safe_open(own if own.exists() else path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
