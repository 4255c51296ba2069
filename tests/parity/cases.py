"""What layouts, models and batches the parity tests and the fuzzer choose from, and which of them fit together.

A case is one value for each dimension below. Whether it is valid, only the rules of the settings say; a dimension whose
setting does not exist, and a value that it cannot have, are left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from pydantic import ValidationError

from megagap.config.loading import override_faults
from megagap.config.rules import check_rules
from megagap.config.settings import SECTIONS, Settings
from megagap.data.indexed import IndexedDatasetWriter
from megagap.parallel.placement import spread_layers
from megagap.parallel.schedule import SCHEDULES
from tests.recipes import write_recipe, write_tokens

Case = dict[str, Any]

MOST_RANKS = 8
STEPS = 4


@dataclass(frozen=True)
class Dimension:
    """``values`` of a setting, ``section.key``, or of what settings are derived from (a name without a dot)."""

    name: str
    values: tuple[Any, ...]
    """The simplest first: what fails is reduced towards it."""
    share: float | None = None
    """How often the fuzzer takes another than the first; by default all values are alike."""

    def draw(self, random: Random) -> Any:
        if self.share is not None and random.random() >= self.share:
            return self.values[0]
        return random.choice(self.values if self.share is None else self.values[1:] or self.values)


_LAYOUT = (
    Dimension("parallel.tp", (1, 2, 4)),
    Dimension("parallel.pp", (1, 2, 3, 4)),
    Dimension("parallel.cp", (1, 2, 4), share=0.5),
    Dimension("dp", (1, 2, 4)),
    Dimension("parallel.dp_replicate", (1, 2), share=0.4),
    Dimension("parallel.sequence_parallel", (None, False, True)),
    Dimension("parallel.schedule", tuple(SCHEDULES)),
    Dimension("parallel.vpp", (1, 2)),
    Dimension("stages", ("even", "most in front", "head alone")),
    Dimension("parallel.context_mode", ("ring", "alltoall", "allgather")),
    Dimension("optim.zero", (1, 0, 2, 3)),
    Dimension("train.recompute", ("none", "selective", "full")),
    Dimension("train.compile", (False, True), share=0.02),
)
_MODEL = (
    Dimension("model.vocab_size", (17, 127, 517)),
    Dimension("model.num_hidden_layers", (1, 2, 3, 5)),
    Dimension("model.hidden_size", (16, 32, 48)),
    Dimension("model.num_attention_heads", (1, 2, 4, 8)),
    Dimension("model.num_key_value_heads", (1, 2, 4, 8)),
    Dimension("model.head_dim", (8, 0, 6)),
    Dimension("model.intermediate_size", (16, 24, 52)),
    Dimension("model.tie_word_embeddings", (False, True)),
    Dimension("model.headless", (False, True), share=0.3),
    Dimension("model.attention_bias", (False, True)),
    Dimension("model.mlp_bias", (False, True)),
    Dimension("model.norm_gain_scale", (1.0, 20.0)),
    Dimension("model.norm_position", ("pre", "post"), share=0.3),
    Dimension("model.qk_norm", (False, True), share=0.3),
)
_BATCH = (
    Dimension("microbatches", (1, 2, 3, 5)),
    Dimension("train.micro_batch_size", (1, 2, 3)),
    Dimension("train.sequence_length", (8, 16, 24, 32)),
    Dimension("data.document_mask", (False, True)),
    Dimension("documents", ("long", "of one token, every other sample", "of one token"), share=0.25),
    # fp16-mixed is compared in the grid only: whether a scaled sum overflows, and its step is skipped, depends on the
    # order of its additions.
    Dimension("train.precision", ("fp32", "bf16-mixed", "bf16-pure"), share=0.2),
    Dimension("optim.clip_grad", (1.0, 0.0)),
    Dimension("train.z_loss", (0.0, 0.01), share=0.25),
)

ONE_PROCESS = ("parallel", "optim.zero", "train.recompute", "train.compile")
"""What says how a model is computed, not what is computed: sections and settings that one process does without."""


def _known(dimensions: tuple[Dimension, ...]) -> tuple[Dimension, ...]:
    def possible(dimension: Dimension) -> Dimension | None:
        section, _, key = dimension.name.partition(".")
        if not key:
            return dimension
        if key not in SECTIONS[section].model_fields:
            return None
        values = tuple(v for v in dimension.values if v is None or not override_faults(f"{dimension.name}={_toml(v)}"))
        return Dimension(dimension.name, values, dimension.share) if values else None

    return tuple(found for dimension in dimensions if (found := possible(dimension)) is not None)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


LAYOUT, MODEL, BATCH = _known(_LAYOUT), _known(_MODEL), _known(_BATCH)
DIMENSIONS = LAYOUT + MODEL + BATCH
"""The layout first: the fuzzer reduces in this order."""


def simplest() -> Case:
    return {dimension.name: dimension.values[0] for dimension in DIMENSIONS}


def ranks_of(case: Mapping[str, Any]) -> int:
    return case["dp"] * case.get("parallel.tp", 1) * case.get("parallel.pp", 1) * case.get("parallel.cp", 1)


def layout_name(case: Mapping[str, Any]) -> str:
    """What of the layout is not the simplest, for the id of a test."""
    parts = [
        f"{dimension.name.rpartition('.')[2]}={case[dimension.name]}"
        for dimension in LAYOUT
        if case[dimension.name] != dimension.values[0]
    ]
    return " ".join(parts) or "one process"


def sections_of(case: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The case as a recipe's settings by section, except its sources."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    sections["model"] |= {"max_position_embeddings": 64, "rope_theta": 10000.0}
    sections["train"] |= {"steps": STEPS, "seed": 7}
    # With the usual eps, AdamW's update of a gradient that is nothing but rounding (of biases of keys) is a large one.
    sections["optim"] |= {"lr": 1e-3, "warmup_steps": 2, "eps": 1e-4}
    sections["train"]["global_batch_size"] = case["train.micro_batch_size"] * case["microbatches"] * case["dp"]
    for name, value in case.items():
        section, _, key = name.partition(".")
        if key and value is not None:
            sections[section][key] = value
    if (counts := _layers_per_stage(case, sections)) is not None:
        sections["parallel"]["layers_per_stage"] = counts
    return sections


def _layers_per_stage(case: Mapping[str, Any], sections: dict[str, dict[str, Any]]) -> list[int] | None:
    if case["stages"] == "even":
        return None
    layers = case["model.num_hidden_layers"]
    stages = case.get("parallel.pp", 1) * case.get("parallel.vpp", 1)
    if case["stages"] == "most in front":
        return [layers - stages + 1, *[1] * (stages - 1)]
    return [*spread_layers(layers, stages - 1), 0] if 1 < stages <= layers + 1 else [layers, *[0] * (stages - 1)]


def is_valid(case: Mapping[str, Any]) -> bool:
    """Whether the settings' own types and rules accept it, and it has few enough ranks."""
    ranks = ranks_of(case)
    if ranks > MOST_RANKS:
        return False
    try:
        settings = Settings.model_validate(sections_of(case))
    except ValidationError:
        return False
    values = {
        f"{section}.{key}": getattr(getattr(settings, section), key)
        for section, kind in SECTIONS.items()
        for key in kind.model_fields
    }
    return not check_rules(values, ranks)


def write_case(folder: Path, case: Case) -> Path:
    """The case as ``folder/recipe.toml``, with its data."""
    write_documents(folder, case["model.vocab_size"], case["documents"])
    sections = {name: values for name, values in sections_of(case).items() if values or name == "parallel"}
    sections["data"] = sections.get("data", {}) | _mixture(case["documents"])
    return write_recipe(folder, **sections)


def _mixture(documents: str) -> dict[str, Any]:
    one, other = {"path": "fr_text_document"}, {"path": "en_text_document"}
    shares = (0.5, 0.5) if documents == "of one token, every other sample" else (0.7, 0.3)
    return {"sources": [one | {"weight": shares[0]}, other | {"weight": shares[1]}], "split": "100,0,0"}


def write_documents(folder: Path, vocabulary: int, documents: str) -> None:
    """Two sources. A document of one token has no target of its own: with a document mask all of it is masked."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("fr", "en")):
        prefix = folder / f"{name}_text_document"
        if documents == "long" or (name == "fr" and "every other" in documents):
            write_tokens(prefix, seed, vocabulary=vocabulary)
            continue
        tokens = np.random.default_rng(seed).integers(vocabulary, size=(2000, 1))
        with IndexedDatasetWriter(str(prefix), np.dtype("uint16")) as writer:
            for document in tokens:
                writer.add_document(document)


def reduced(case: Case, fails: Callable[[Case], bool]) -> Case:
    """A case that still fails, in which no dimension alone can be made simpler."""

    def try_simpler(simpler: Case) -> bool:
        nonlocal case
        if simpler == case or not is_valid(simpler) or not fails(simpler):
            return False
        case = simpler
        return True

    for group in (BATCH, MODEL, LAYOUT):  # whole groups first, which are many dimensions in one run
        try_simpler(case | {dimension.name: dimension.values[0] for dimension in group})
    changed = True
    while changed:
        changed = False
        for dimension in DIMENSIONS:
            simpler_values = dimension.values[: dimension.values.index(case[dimension.name])]
            changed |= any(try_simpler(case | {dimension.name: value}) for value in simpler_values)
    return case
