"""A model's settings as ``config.json`` has them, both ways: all that a new architecture has to say to Hugging Face.

The tensors need nothing: they have Hugging Face's names and layout. A headless model leaves as ``LlamaModel``, whose
config ties nothing, so that who adds an output projection gets a new one and not, without a word, the embedding.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megagap.checkpoint.companions import CONFIG, Companions, read_json
from megagap.checkpoint.huggingface_extensions import refuse_extensions
from megagap.checkpoint.load import resolve_checkpoint
from megagap.checkpoint.recognise import export_command, require_path
from megagap.config import Model, check_rules
from megagap.errors import CheckpointError
from megagap.files import file_errors

ARCHITECTURES = {"llama": "LlamaForCausalLM", "olmo2": "Olmo2ForCausalLM"}
"""What can be written and read: ``model_type``, and the class that transformers computes it with."""

# What config.json may leave out, and the defaults of transformers' LlamaConfig, and where Olmo2Config has others.
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
}
_DEFAULTS = {"olmo2": {"rms_norm_eps": 1e-5}}

_SWITCHES: dict[str, dict[str, Any]] = {"olmo2": {"norm_position": "post", "qk_norm": True}}
"""Settings of the model that go without saying, where they are not our defaults."""


def require_architecture(model: Model) -> None:
    """Raises :class:`CheckpointError` if no class of transformers computes what ``model`` does."""
    is_olmo2 = [getattr(model, name) == value for name, value in _SWITCHES["olmo2"].items()]
    reason = None
    if any(is_olmo2) and not all(is_olmo2):
        settings = f'model.norm_position = "{model.norm_position}" with model.qk_norm = {json.dumps(model.qk_norm)}'
        reason = f"{settings}; OLMo 2 has norms both behind the blocks and of queries and keys, Llama neither"
    elif model.qk_norm and model.mlp_bias:
        reason = "model.mlp_bias = true, and OLMo 2 has no such biases"
    if reason is not None:
        raise CheckpointError(
            f"transformers has no class for this model: {reason}\n  it can be trained on and evaluated by megagap only."
        )


def hugging_face_config(model: Model, dtype: str, companions: Companions) -> dict[str, Any]:
    """``config.json``, with the rotary settings and the dtype where transformers 4 and 5 look for them."""
    scaling = model.rope_scaling.model_dump() if model.rope_scaling else None
    return {
        "architectures": [_architecture(model)],
        "model_type": _model_type(model),
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model.rope_theta, **(scaling or {"rope_type": "default"})},
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings and not model.headless,
        "attention_bias": model.attention_bias,
        "attention_dropout": 0.0,
        **({} if model.qk_norm else {"mlp_bias": model.mlp_bias}),  # which Olmo2Config lacks
        "initializer_range": model.initializer_range,
        "use_cache": True,
        **companions.special_ids,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _model_type(model: Model) -> str:
    """The key of :data:`ARCHITECTURES` that computes what ``model`` does."""
    return "olmo2" if model.qk_norm else "llama"


def _architecture(model: Model) -> str:
    """The class that transformers computes ``model`` with; of a headless one, that without output projection."""
    whole = ARCHITECTURES[_model_type(model)]
    return whole.replace("ForCausalLM", "Model") if model.headless else whole


def hugging_face_name(name: str, model: Model) -> str:
    """What the class of :func:`hugging_face_config` calls one of our tensors."""
    return name.removeprefix("model.") if model.headless else name


def read_settings(folder: Path) -> Model:
    """The model's settings from ``config.json``, as transformers 4 or 5 writes it.

    Raises :class:`CheckpointError`, naming the field, if it is no Llama or OLMo 2 or has features that we lack.
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
        name: default if config.get(name) is None else config[name]
        for name, default in (_OPTIONAL | _DEFAULTS.get(config["model_type"], {})).items()
    }
    values |= _SWITCHES.get(config["model_type"], {})
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
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise _no_llama(path, "model_type", kind)
    architectures = config.get("architectures") or [ARCHITECTURES[kind]]
    if architectures != [ARCHITECTURES[kind]]:
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
        '  only models of type "llama" (LlamaForCausalLM: Llama 2 and 3) and "olmo2" (Olmo2ForCausalLM) can be read.'
    )


def _unusable(path: Path, field: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: {field} {problem}")
