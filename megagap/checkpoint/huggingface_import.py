"""A Hugging Face Llama, ``config.json`` and safetensors, as a checkpoint or directly as a model.

The folder is untrusted input: nothing is used of it before names, shapes and dtypes are found to fit its
``config.json``, and the safetensors library has checked its headers. Pickled weights are never opened.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from megagap.checkpoint.companions import CONFIG, read_companions, read_json, tokenizer_of, warn_of_other_ids
from megagap.checkpoint.huggingface_extensions import refuse_extensions
from megagap.checkpoint.load import resolve_checkpoint
from megagap.checkpoint.model import SingleProcessModel, build_model, widest
from megagap.checkpoint.output import require_new
from megagap.checkpoint.recognise import export_command, require_path
from megagap.checkpoint.save import save_checkpoint
from megagap.config import Model, check_rules
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

# What config.json may leave out, and the defaults of transformers' LlamaConfig.
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
}


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

    progress_of_run = {"step": 0, "updates": 0, "consumed_samples": 0, "consumed_tokens": 0}
    state: dict[str, Any] = {"model": model.model_dump(mode="json"), "data": {"tokenizer": tokenizer or ""}}
    loaded = _readable_tokenizer(tokenizer) if tokenizer else None
    if loaded:
        warn_of_other_ids(None, loaded, model.vocab_size, companions)
        state["ids"] = Ids.of_tokenizer(loaded).record()
    save_checkpoint(output, slices(), progress_of_run | state | companions.state(), progress=one_pass_over)
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
            f"{folder} has {name}, which does not belong to a Llama as its {CONFIG} describes it\n"
            "  only plain Llama 2 and 3 models can be read."
        )


def _check_finite(folder: Path, name: str, tensor: Tensor) -> None:
    """The files carry no checksums: this finds at least the worst of what may have happened to them."""
    if not all(bound.isfinite() for bound in tensor.aminmax()):
        raise CheckpointError(f"{folder}: {name} has values that are not finite\n  download the model again.")


# -------------------------------------------------------------------------------------------------------- config.json


def read_settings(folder: Path) -> Model:
    """The model's settings from ``config.json``, as transformers 4 or 5 writes it.

    Raises :class:`CheckpointError`, naming the field, if it is not a Llama or has features that we lack.
    """
    require_path(folder)
    path = folder / CONFIG
    with file_errors(f"cannot read {folder}", folder, CheckpointError):
        if not path.is_file():
            raise _no_hugging_face_model(folder)
    config = read_json(path)
    _refuse_others(path, config)
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        raise _unusable(path, missing[0], "is missing")
    values = {name: config[name] for name in _REQUIRED} | {
        name: default if config.get(name) is None else config[name] for name, default in _OPTIONAL.items()
    }
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = (
        heads if config.get("num_key_value_heads") is None else config["num_key_value_heads"]
    )
    values["head_dim"] = config.get("head_dim") or 0
    values |= _rotary(path, config, values["max_position_embeddings"])
    try:
        model = Model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise _unusable(path, field, f"is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    faults = check_rules({f"model.{name}": value for name, value in model}, None)
    if faults:
        field = faults[0].setting.removeprefix("model.")
        raise _unusable(path, field, f"is {faults[0].value}: {faults[0].message.replace('model.', '')}")
    return model.model_copy(update={"head_dim": model.head_dim or model.hidden_size // model.num_attention_heads})


def _no_hugging_face_model(folder: Path) -> CheckpointError:
    try:
        checkpoint = resolve_checkpoint(folder)
    except CheckpointError as error:
        reason, _, cure = str(error.args[0]).partition("\n")
        if not folder.is_dir() or "make it a checkpoint" in cure or "download" in cure:
            return CheckpointError(f"{reason}\n  give the folder of a Hugging Face model, with its {CONFIG}.")
        return CheckpointError(f"{folder} is not a Hugging Face model: it has no {CONFIG}\n  give the folder of one.")
    return CheckpointError(
        f"{folder} is not a Hugging Face model but already a checkpoint of megagap\n  use it as it is, or make it a "
        f"Hugging Face model: {export_command(checkpoint)}"
    )


def _refuse_others(path: Path, config: dict[str, Any]) -> None:
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if config.get("model_type") != "llama":
        raise _no_llama(path, "model_type", config.get("model_type"))
    if architectures != ["LlamaForCausalLM"]:
        raise _no_llama(path, "architectures", architectures)
    if config.get("hidden_act", "silu") != "silu":
        raise _unusable(path, "hidden_act", f"is {config['hidden_act']!r}; only 'silu' is supported")
    if config.get("quantization_config"):
        raise _unusable(path, "quantization_config", "is set; quantised weights are not supported")
    refuse_extensions(path, config)


def _rotary(path: Path, config: dict[str, Any], max_position_embeddings: Any) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of either form: at top level, or in ``rope_parameters``."""
    merged: dict[str, Any] = {}
    for field in ("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters"):
        value = config.get(field)
        if value is None:
            continue
        if field in ("rope_scaling", "rope_parameters"):
            if not isinstance(value, dict):
                raise _unusable(path, field, f"is {value!r}; it must be an object")
        else:
            value = {field: value}
        for key, inner in value.items():
            key = "rope_type" if key == "type" else key
            if merged.setdefault(key, inner) != inner:
                raise _unusable(path, field, f"says {key} = {inner!r}, but elsewhere it is {merged[key]!r}")
    kind, theta = merged.pop("rope_type", None), merged.pop("rope_theta", 10000.0)
    if merged.pop("partial_rotary_factor", 1.0) != 1:
        raise _unusable(path, "partial_rotary_factor", "is set; only whole heads can be rotated")
    if kind is None and merged:
        raise _unusable(path, "rope_scaling", f"says {next(iter(merged))}, but no rope_type")
    kind = kind or "default"
    if kind == "default":
        ignored = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        for key in merged.keys() - ignored:
            if merged[key] is not None:
                raise _unusable(path, "rope_scaling", f"says {key} = {merged[key]!r}, which is not supported")
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "llama3":
        raise _unusable(path, "rope_scaling", f"is of type {kind!r}; only 'llama3' is supported")
    defaults = {"original_max_position_embeddings": max_position_embeddings}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind} | defaults | merged}


def _no_llama(path: Path, field: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{path.parent} is not a Llama model: {path.name} says {field} = {json.dumps(value)}\n"
        '  only models of type "llama" (LlamaForCausalLM: Llama 2 and 3) can be read.'
    )


def _unusable(path: Path, field: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: {field} {problem}")


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
