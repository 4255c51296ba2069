"""The settings of a run: one typed tree, read from a TOML recipe and dotted overrides.

Defaults < ``model.preset`` < recipe < command line. Every fault is collected and reported at once, before any process
group exists. A setting explains itself in the docstring below it: ``--help`` and error messages come from that text.
"""

import difflib
import glob
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from megagap.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SampleRange = Annotated[str, Field(pattern=r"^[0-9]+:[0-9]+$")]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True)


class RopeScaling(Section):
    """Llama 3.1's stretch of the rotary wavelengths to longer contexts."""

    rope_type: Literal["llama3"]
    factor: Annotated[float, Field(ge=1)]
    low_freq_factor: AboveZero
    high_freq_factor: AboveZero
    original_max_position_embeddings: Positive


class Model(Section):
    preset: str = ""
    """A published shape to start from; `tiny`, `llama3-8b`, `llama3.2-1b`, `gaperon-1b` or `gaperon-8b`."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_hidden_layers: Positive
    """Transformer layers."""
    num_attention_heads: Positive
    """Query heads."""
    num_key_value_heads: Positive
    """Key/value heads; must divide num_attention_heads (grouped-query attention)."""
    head_dim: Annotated[int, Field(ge=0, multiple_of=2)] = 0
    """Width of a head; 0 means hidden_size / num_attention_heads."""
    intermediate_size: Positive
    """Width of the SwiGLU feed-forward."""
    vocab_size: Positive
    """Token ids, without padding."""
    max_position_embeddings: Positive
    """Longest sequence that the model is meant for."""
    rope_theta: AboveZero = 500000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's long-context scaling, `{rope_type = "llama3", factor = …, …}`."""
    rms_norm_eps: AboveZero = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = False
    """Use the token embedding as the output projection too."""
    attention_bias: bool = False
    """Biases on the q, k, v and o projections."""
    mlp_bias: bool = False
    """Biases on the gate, up and down projections."""
    initializer_range: AboveZero = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get it / sqrt(2 layers)."""


class Parallel(Section):
    tp: Positive = 1
    """Tensor-parallel ranks: each layer's matrices are split over them. Keep within a node; must divide the heads."""
    pp: Positive = 1
    """Pipeline-parallel ranks: the layers are split over them, in order."""
    sequence_parallel: bool | None = None
    """Split the residual stream over tp along the sequence; saves activation memory. Default: true where tp > 1."""
    schedule: Literal["gpipe", "1f1b"] = "1f1b"
    """Order of forwards and backwards in the pipeline."""
    layers_per_stage: list[Count] | None = None
    """Layers of each pipeline stage; by default spread evenly, earlier stages first."""


class Source(Section):
    path: str | list[str]
    """Prefix of a .bin/.idx pair without the ending; a glob or a list stands for shards of one source."""
    weight: AboveZero = 1.0
    """Share of the samples, relative to the other sources."""
    name: str = ""
    """Name in logs; by default from the path."""

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


class Data(Section):
    tokenizer: str = ""
    """Tokenizer of the sources (file or folder), exported with the model; optional for training."""
    sources: list[Source] = []
    """What to train on, `[{path = "…", weight = …}, …]`."""
    validation: list[Source] = []
    """Held-out sources; by default the second part of `split`."""
    split: str = "100,0,0"
    """Shares of each source's documents for training, validation and test."""
    order: Literal["shuffled"] = "shuffled"
    """Order of the samples; `shuffled` depends on the seed and the sample number only."""


class Train(Section):
    steps: Count = 0
    """Updates to make; or give `tokens`."""
    tokens: Count = 0
    """Tokens to train on, rounded up to a whole step; or give `steps`."""
    global_batch_size: Positive
    """Sequences an update, over all ranks."""
    micro_batch_size: Positive = 1
    """Sequences that one rank computes at a time."""
    sequence_length: Positive
    """Tokens a sequence."""
    precision: Literal["fp32", "bf16-mixed"] = "fp32"
    """Arithmetic of the model; `bf16-mixed` keeps fp32 masters, sums gradients and updates in fp32."""
    skip_samples: list[SampleRange] = []
    """Global sample numbers to leave out, `["lo:hi", …]` without hi: the usual answer to a loss spike."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Rules initial weights and the order of samples, whatever the layout."""
    evaluate_every: Count = 0
    """Steps between evaluations on the held-out set; 0: never."""
    evaluate_samples: Positive = 64
    """Sequences of each validation source in an evaluation, always the same."""


class Optim(Section):
    name: Literal["adamw"] = "adamw"
    """Optimizer."""
    lr: AboveZero = 3e-4
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of a decay."""
    warmup_steps: Count = 0
    """Steps of linear warmup; step 1 uses lr / warmup_steps."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Learning rate after the warmup; `wsd` stays constant until a cooldown at the end."""
    cooldown_steps: Count = 0
    """Last steps of `wsd`, in which the rate falls to min_lr."""
    cooldown_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of that fall; `sqrt` is 1 - sqrt(progress)."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay (AdamW)."""
    decay_embeddings: bool = False
    """Apply weight decay to the token embedding too."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    eps: AboveZero = 1e-8
    """AdamW's epsilon."""
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0: no clipping."""
    zero: Literal[1] = 1
    """What is sharded over data-parallel ranks; 1: optimizer state and masters."""


class Checkpoint(Section):
    every: Count = 0
    """Steps between checkpoints; one is always written at the end."""
    keep: Count = 0
    """Newest checkpoints to keep; 0: all."""
    load: str = "latest"
    """`latest` goes on from this run's newest checkpoint, a folder seeds an empty run, "" starts afresh."""
    load_mode: Literal["continue", "model"] = "continue"
    """What to take from the folder that seeds a run; `continue`: everything, `model`: the weights, from step 0."""


class Run(Section):
    dir: str = ""
    """The run directory; by default runs/ and the recipe's name."""
    tensorboard: bool = True
    """Write TensorBoard files into the run directory."""
    max_minutes: NonNegative = 0
    """Save and stop like after a signal once this much time has passed; 0: no limit."""
    log_every: Positive = 10
    """Steps between console lines; metrics.jsonl has every step."""


class Settings(Section):
    model: Model
    parallel: Parallel = Parallel()
    data: Data = Data()
    train: Train
    optim: Optim = Optim()
    checkpoint: Checkpoint = Checkpoint()
    run: Run = Run()


SECTIONS = {name: cast(type[Section], field.annotation) for name, field in Settings.model_fields.items()}


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: the setting's dotted name, the value as given, and what to do."""

    setting: str
    value: Any
    message: str


# ---------------------------------------------------------------------------------------------------------- loading


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None, *, needs_data: bool = True
) -> Settings:
    """Read a TOML recipe and ``section.key=value`` overrides into checked, resolved settings.

    ``world_size``: the number of processes, if known; the layout is then checked against it. ``needs_data``: whether
    ``data.sources`` must be there.
    Raises :class:`ConfigError` with every fault found.
    """
    path = Path(path)
    tree = _read_toml(path)
    faults = [fault for override in overrides for fault in _apply_override(tree, override)]
    faults += _apply_preset(tree)
    values, section_faults = _validate(tree)
    faults += section_faults
    faults += check_rules(values, world_size, needs_data)
    if faults:
        raise ConfigError(_render(path, faults))
    return _resolve(Settings.model_validate(tree), path)


def parse_overrides(arguments: Sequence[str]) -> list[str]:
    """``--section.key value`` and ``--section.key=value`` of a command line as ``section.key=value``."""
    overrides = []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--") or "." not in argument:
            raise ConfigError(f"unexpected argument {argument!r}: settings are given as --section.key value")
        name, equals, value = argument[2:].partition("=")
        if not equals:
            try:
                value = next(remaining)
            except StopIteration:
                raise ConfigError(f"--{name} needs a value") from None
        overrides.append(f"{name}={value}")
    return overrides


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _apply_override(tree: dict[str, Any], override: str) -> Iterator[Fault]:
    name, _, text = override.partition("=")
    section, _, key = name.partition(".")
    field = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
    if field is None:
        yield _unknown(name, text)
        return
    if not isinstance(tree.setdefault(section, {}), dict):
        return  # reported by _validate
    tree[section][key] = text if field.annotation is str else _parse_value(text)


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _apply_preset(tree: dict[str, Any]) -> Iterator[Fault]:
    model = tree.get("model")
    name = model.get("preset") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(name, str) or not name:
        return  # no preset, or one that _validate reports
    presets = tomllib.loads(files("megagap.model").joinpath("presets.toml").read_text(encoding="utf-8"))
    if name not in presets:
        yield Fault("model.preset", name, f"unknown; possible: {', '.join(presets)}")
        return
    tree["model"] = presets[name] | model


def _validate(tree: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Validate setting by setting, so that rules can run on whatever is sound.

    Returns the sound values by dotted name, defaults included, and the faults.
    """
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    for section in tree.keys() - SECTIONS.keys():
        faults.append(_unknown(section, tree[section]))
    for section, kind in SECTIONS.items():
        given = tree.get(section, {})
        if not isinstance(given, dict):
            faults.append(Fault(section, given, "must be a table of settings"))
            continue
        faults += [_unknown(f"{section}.{key}", given[key]) for key in given if key not in kind.model_fields]
        for key, field in kind.model_fields.items():
            name = f"{section}.{key}"
            if key not in given:
                if field.is_required():
                    hint = " (or choose a model.preset)" if section == "model" else ""
                    faults.append(Fault(name, None, f"is required{hint}"))
                else:
                    values[name] = field.get_default(call_default_factory=True)
                continue
            annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            adapter: TypeAdapter[Any] = TypeAdapter(
                annotation,
                config=None if _is_section(field.annotation) else ConfigDict(strict=_is_strict(field.metadata)),
            )
            try:
                values[name] = adapter.validate_python(given[key])
            except ValidationError as error:
                faults += [_from_pydantic(name, given[key], detail) for detail in error.errors()]
    return values, faults


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_strict(metadata: Iterable[Any]) -> bool:
    return not any(getattr(item, "strict", None) is False for item in metadata)


def _from_pydantic(name: str, value: Any, detail: Any) -> Fault:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return Fault(name + place, detail["input"], "unknown")
    context = detail.get("ctx", {})
    messages = {
        "greater_than_equal": lambda: f"must be at least {context['ge']}",
        "greater_than": lambda: f"must be above {context['gt']}",
        "string_pattern_mismatch": lambda: 'must look like "1000:2000"',
        "less_than": lambda: f"must be below {context['lt']}",
        "literal_error": lambda: f"possible here: {context['expected']}",
        "missing": lambda: "is required",
    }
    message = messages.get(detail["type"], lambda: detail["msg"][0].lower() + detail["msg"][1:])()
    return Fault(name + place, detail["input"] if detail["type"] != "missing" else None, message)


def _unknown(name: str, value: Any) -> Fault:
    nearest = _nearest(name)
    return Fault(name, value, f"unknown; did you mean {nearest}?" if nearest else "unknown")


def _nearest(name: str) -> str | None:
    """The setting or section that is most likely meant: the same key elsewhere, a like name, a like description."""
    fields = {
        f"{section}.{key}": field for section, kind in SECTIONS.items() for key, field in kind.model_fields.items()
    }
    key = name.rpartition(".")[2]
    same_key = [candidate for candidate in fields if candidate.rpartition(".")[2] == key]
    names = {candidate: candidate for candidate in (*fields, *SECTIONS)}
    phrases: dict[str, str] = {}
    for candidate, field in fields.items():
        words = re.findall(r"[a-z]+", (field.description or "").lower())
        for length in (1, 2, 3):
            for start in range(len(words) - length + 1):
                phrases.setdefault(" ".join(words[start : start + length]), candidate)
    keys = {candidate.rpartition(".")[2]: candidate for candidate in reversed(fields)}
    for wanted, known, cutoff in (
        (name, names, 0.85),
        (key.replace("_", " "), phrases, 0.85),
        (key, keys, 0.7),
        (key.replace("_", " "), phrases, 0.75),
    ):
        same_key += [known[match] for match in difflib.get_close_matches(wanted, known, n=1, cutoff=cutoff)]
    return same_key[0] if same_key else None


def _render(path: Path, faults: Sequence[Fault]) -> str:
    lines = []
    for fault in faults:
        shown = repr(fault.value) if isinstance(fault.value, str) else str(fault.value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        lines.append((fault.setting if fault.value is None else f"{fault.setting} = {shown}", fault.message))
    width = min(max(len(left) for left, _ in lines), 48)
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return f"{count} in {path}\n" + "\n".join(f"  {left:<{width}}  {message}" for left, message in lines)


def _resolve(settings: Settings, recipe: Path) -> Settings:
    """Fill in what depends on other settings, and make paths absolute."""
    model, parallel, data, train = settings.model, settings.parallel, settings.data, settings.train
    tokens_a_step = train.global_batch_size * train.sequence_length
    folder = recipe.parent.resolve()
    return settings.model_copy(
        update={
            "model": model.model_copy(
                update={"head_dim": model.head_dim or model.hidden_size // model.num_attention_heads}
            ),
            "parallel": parallel.model_copy(
                update={
                    "sequence_parallel": parallel.tp > 1
                    if parallel.sequence_parallel is None
                    else parallel.sequence_parallel,
                    "layers_per_stage": parallel.layers_per_stage
                    or spread_layers(model.num_hidden_layers, parallel.pp),
                }
            ),
            "data": data.model_copy(
                update={
                    "tokenizer": _resolve_tokenizer(data.tokenizer, folder),
                    "sources": [_resolve_source(source, folder) for source in data.sources],
                    "validation": [_resolve_source(source, folder) for source in data.validation],
                }
            ),
            "train": train.model_copy(update={"steps": train.steps or -(-train.tokens // tokens_a_step), "tokens": 0}),
            "run": settings.run.model_copy(
                update={"dir": str(Path(settings.run.dir or Path("runs") / recipe.stem).resolve())}
            ),
        }
    )


def _resolve_source(source: Source, folder: Path) -> Source:
    paths = []
    for pattern in source.paths:
        full = str(folder / pattern)
        matches: list[str] = []
        if glob.has_magic(pattern) and not Path(full + ".idx").exists():
            # A pattern names prefixes, the files carry an ending: match on the index files.
            found = glob.glob(pattern + ".idx", root_dir=folder)
            matches = sorted(str(folder / name).removesuffix(".idx") for name in found)
        paths += matches or [full]
    return source.model_copy(update={"path": paths, "name": source_name(source)})


def _resolve_tokenizer(spec: str, folder: Path) -> str:
    """A path, perhaps behind a kind such as ``hf:``; made absolute."""
    kind = next((kind for kind in ("hf:", "sentencepiece:", "tiktoken:") if spec.startswith(kind)), "")
    return f"{kind}{folder / spec.removeprefix(kind)}" if spec else ""


def source_name(source: Source) -> str:
    """The given name, or the file's name without folder and Megatron's ``_text_document``."""
    return source.name or Path(source.paths[0]).name.removesuffix("_document").removesuffix("_text")


def spread_layers(layers: int, stages: int) -> list[int]:
    """Layers of each stage; what does not divide goes to the earlier stages."""
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


# ------------------------------------------------------------------------------------------------------------ rules

Lookup = Callable[[str], Any]
Rule = Callable[[Lookup], Iterator[Fault]]


class _Unsound(Exception):
    """A rule asked for a setting that is itself faulty: the rule does not apply."""


def check_rules(values: dict[str, Any], world_size: int | None, needs_data: bool = False) -> list[Fault]:
    """All faults between settings, checked on those that are sound by themselves."""

    def lookup(name: str) -> Any:
        if name not in values:
            raise _Unsound
        return values[name]

    faults: list[Fault] = []
    for rule in (*RULES, lambda v: _ranks_fit(v, world_size), lambda v: _has_sources(v, needs_data)):
        try:
            faults += rule(lookup)
        except _Unsound:
            continue
    return faults


def divisors(*numbers: int) -> str:
    smallest = min(numbers)
    return ", ".join(str(d) for d in range(1, smallest + 1) if all(n % d == 0 for n in numbers))


def _heads_share_keys(v: Lookup) -> Iterator[Fault]:
    heads, kv = v("model.num_attention_heads"), v("model.num_key_value_heads")
    if heads % kv:
        message = f"does not divide model.num_attention_heads = {heads}; possible: {divisors(heads)}"
        yield Fault("model.num_key_value_heads", kv, message)


def _heads_have_a_width(v: Lookup) -> Iterator[Fault]:
    heads, hidden, head_dim = v("model.num_attention_heads"), v("model.hidden_size"), v("model.head_dim")
    if not head_dim and hidden % (2 * heads):
        yield Fault(
            "model.hidden_size", hidden, f"is no even multiple of model.num_attention_heads = {heads}; or set head_dim"
        )


def _tp_divides_heads(v: Lookup) -> Iterator[Fault]:
    tp, heads = v("parallel.tp"), v("model.num_attention_heads")
    if heads % tp:
        yield Fault(
            "parallel.tp", tp, f"does not divide model.num_attention_heads = {heads}; possible: {divisors(heads)}"
        )


def _tp_fits_key_values(v: Lookup) -> Iterator[Fault]:
    tp, kv = v("parallel.tp"), v("model.num_key_value_heads")
    if kv % tp and tp % kv:
        yield Fault("parallel.tp", tp, f"neither divides nor is a multiple of model.num_key_value_heads = {kv}")


def _tp_divides_feed_forward(v: Lookup) -> Iterator[Fault]:
    tp, size = v("parallel.tp"), v("model.intermediate_size")
    if size % tp:
        yield Fault("parallel.tp", tp, f"does not divide model.intermediate_size = {size}")


def _tp_divides_sequence(v: Lookup) -> Iterator[Fault]:
    tp, length, on = v("parallel.tp"), v("train.sequence_length"), v("parallel.sequence_parallel")
    if on is not False and tp > 1 and length % tp:
        message = f"is no multiple of parallel.tp = {tp}, as sequence_parallel needs; or switch that off"
        yield Fault("train.sequence_length", length, message)


def _sequence_parallel_needs_tp(v: Lookup) -> Iterator[Fault]:
    if v("parallel.sequence_parallel") and v("parallel.tp") == 1:
        yield Fault("parallel.sequence_parallel", True, "splits over parallel.tp, which is 1")


def _stages_have_layers(v: Lookup) -> Iterator[Fault]:
    pp, layers, given = v("parallel.pp"), v("model.num_hidden_layers"), v("parallel.layers_per_stage")
    if pp > layers:
        yield Fault("parallel.pp", pp, f"is more than model.num_hidden_layers = {layers}: a stage would have none")
    elif given is not None and (len(given) != pp or sum(given) != layers):
        yield Fault(
            "parallel.layers_per_stage", given, f"must be {pp} numbers (parallel.pp) that add up to {layers} layers"
        )
    elif given is not None and 0 in given[1:-1]:
        yield Fault("parallel.layers_per_stage", given, "leaves a middle stage without layers: it would do nothing")


def _sequence_fits_model(v: Lookup) -> Iterator[Fault]:
    length, longest = v("train.sequence_length"), v("model.max_position_embeddings")
    if length > longest:
        yield Fault("train.sequence_length", length, f"is longer than model.max_position_embeddings = {longest}")


def _scaling_is_a_band(v: Lookup) -> Iterator[Fault]:
    scaling = v("model.rope_scaling")
    if scaling is not None and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield Fault("model.rope_scaling.high_freq_factor", scaling.high_freq_factor, "must be above low_freq_factor")


def _one_length(v: Lookup) -> Iterator[Fault]:
    steps, tokens = v("train.steps"), v("train.tokens")
    if bool(steps) == bool(tokens):
        yield Fault("train.steps", steps, "give either train.steps or train.tokens" + (", not both" if steps else ""))


def _schedule_fits(v: Lookup) -> Iterator[Fault]:
    warmup, cooldown = v("optim.warmup_steps"), v("optim.cooldown_steps")
    if v("optim.schedule") == "wsd" and not cooldown:
        yield Fault("optim.cooldown_steps", cooldown, 'must be at least 1 with optim.schedule = "wsd"')
    if v("optim.schedule") != "wsd" and cooldown:
        yield Fault("optim.cooldown_steps", cooldown, 'has a meaning with optim.schedule = "wsd" only')
    steps = v("train.steps") or -(-v("train.tokens") // (v("train.global_batch_size") * v("train.sequence_length")))
    if steps and warmup + cooldown > steps:
        yield Fault("optim.warmup_steps", warmup, f"with cooldown_steps = {cooldown} is over the run's {steps} steps")


def _rates_are_ordered(v: Lookup) -> Iterator[Fault]:
    lr, least = v("optim.lr"), v("optim.min_lr")
    if least > lr:
        yield Fault("optim.min_lr", least, f"is above optim.lr = {lr}")


def _shares(text: str) -> list[float] | None:
    """The three shares of ``data.split``; None if it is no such thing."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return shares if len(shares) == 3 and min(shares) >= 0 and 0 < sum(shares) < float("inf") else None


def _split_is_three_shares(v: Lookup) -> Iterator[Fault]:
    text = v("data.split")
    shares = _shares(text)
    if shares is None:
        yield Fault("data.split", text, 'must be three shares such as "98,1,1"')
    elif shares[0] == 0:
        yield Fault("data.split", text, "leaves no documents for training")


def _has_sources(v: Lookup, needs_data: bool) -> Iterator[Fault]:
    if needs_data and not v("data.sources"):
        yield Fault("data.sources", None, 'is required: [{path = "prefix_text_document", weight = 1.0}, …]')


def _sources_are_named(v: Lookup) -> Iterator[Fault]:
    for setting in ("data.sources", "data.validation"):
        if any(not source.paths for source in v(setting)):
            yield Fault(setting, None, "has a source with an empty list of paths")
            continue
        names = [source_name(source) for source in v(setting)]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Fault(setting, name, "names two sources; tell them apart with name = …")


def _evaluation_has_data(v: Lookup) -> Iterator[Fault]:
    held_out = v("data.validation") or (_shares(v("data.split")) or [0, 1])[1] > 0
    if v("train.evaluate_every") and not held_out:
        message = 'needs a held-out set: data.validation, or a data.split such as "98,2,0"'
        yield Fault("train.evaluate_every", v("train.evaluate_every"), message)


def _skipped_ranges_are_ranges(v: Lookup) -> Iterator[Fault]:
    for text in v("train.skip_samples"):
        start, stop = map(int, text.split(":"))
        if start >= stop:
            yield Fault("train.skip_samples", text, "is empty: the second number must be above the first")


def _mode_needs_a_folder(v: Lookup) -> Iterator[Fault]:
    if v("checkpoint.load_mode") != "continue" and v("checkpoint.load") in ("", "latest"):
        message = "says what to take from a folder: name it in checkpoint.load"
        yield Fault("checkpoint.load_mode", v("checkpoint.load_mode"), message)


def _batch_divides(v: Lookup) -> Iterator[Fault]:
    batch, micro = v("train.global_batch_size"), v("train.micro_batch_size")
    if batch % micro:
        yield Fault("train.micro_batch_size", micro, f"does not divide train.global_batch_size = {batch}")


def _ranks_fit(v: Lookup, world_size: int | None) -> Iterator[Fault]:
    if world_size is None:
        return
    tp, pp = v("parallel.tp"), v("parallel.pp")
    if world_size % (tp * pp):
        yield Fault(
            "parallel.tp × parallel.pp", tp * pp, f"does not divide the {world_size} processes that were launched"
        )
        return
    dp, batch, micro = world_size // (tp * pp), v("train.global_batch_size"), v("train.micro_batch_size")
    if batch % (dp * micro) and batch % micro == 0:
        message = f"is no multiple of {dp} data-parallel ranks × micro_batch_size = {micro}"
        yield Fault("train.global_batch_size", batch, message)


RULES: tuple[Rule, ...] = (
    _heads_share_keys,
    _heads_have_a_width,
    _tp_divides_heads,
    _tp_fits_key_values,
    _tp_divides_feed_forward,
    _tp_divides_sequence,
    _sequence_parallel_needs_tp,
    _stages_have_layers,
    _sequence_fits_model,
    _scaling_is_a_band,
    _one_length,
    _schedule_fits,
    _rates_are_ordered,
    _split_is_three_shares,
    _sources_are_named,
    _evaluation_has_data,
    _skipped_ranges_are_ranges,
    _mode_needs_a_folder,
    _batch_divides,
)


# -------------------------------------------------------------------------------------------------------- documenting


def describe_settings() -> str:
    """Every setting with its default and meaning, for ``--help``."""
    lines = []
    for section, kind in SECTIONS.items():
        lines.append(f"\n[{section}]")
        for key, field in kind.model_fields.items():
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            lines.append(f"  --{section}.{key}  ({default!r})\n      {field.description or ''}")
    return "\n".join(lines)
