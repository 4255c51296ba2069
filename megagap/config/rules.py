"""Rules between settings, each a function of few lines, so that all faults are reported at once."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import gcd, lcm
from typing import Any

from megagap.config.faults import Fault
from megagap.config.settings import Guard, Optim, source_name
from megagap.config.timeline import batch_sizes_of, phases_of, run_length
from megagap.errors import counted
from megagap.parallel.layout import sequence_unit
from megagap.parallel.placement import Placement
from megagap.parallel.schedule import SCHEDULES, choose
from megagap.timeline import Timeline

Lookup = Callable[[str], Any]
Rule = Callable[[Lookup], Iterator[Fault]]


MOST_STAGES = 65_536
"""Virtual stages in a pipeline: a schedule lists the actions of all of them."""


MOST_WORLDS = 8
"""Numbers of processes to suggest."""


class _Unsound(Exception):
    """A rule needs a setting that is itself invalid: the rule does not apply."""


def check_rules(values: dict[str, Any], world_size: int | None, needs_data: bool = False) -> list[Fault]:
    """All faults between settings, checked on those that are valid by themselves."""

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


def divisors(number: int) -> str:
    """Those that a layout may have, up to 1,024: a malicious file can give a number too large to try all."""
    return ", ".join(str(d) for d in range(1, min(number, 1024) + 1) if number % d == 0)


def _heads_share_keys(v: Lookup) -> Iterator[Fault]:
    heads, kv = v("model.num_attention_heads"), v("model.num_key_value_heads")
    if heads % kv:
        message = f"does not divide model.num_attention_heads = {heads}; possible: {divisors(heads)}"
        yield Fault("model.num_key_value_heads", kv, message)


def _heads_have_a_width(v: Lookup) -> Iterator[Fault]:
    heads, hidden, head_dim = v("model.num_attention_heads"), v("model.hidden_size"), v("model.head_dim")
    if not head_dim and hidden % (2 * heads):
        message = f"must be an even multiple of model.num_attention_heads = {heads}; or set head_dim"
        yield Fault("model.hidden_size", hidden, message)


MOST_ELEMENTS = 2**58
"""Of one matrix: more than any machine holds, but its bytes can still be counted in 64 bits."""


def _matrices_can_be_counted(v: Lookup) -> Iterator[Fault]:
    hidden, heads = v("model.hidden_size"), v("model.num_attention_heads")
    others = {
        "model.vocab_size": v("model.vocab_size"),
        "model.intermediate_size": v("model.intermediate_size"),
        "model.num_attention_heads": heads * (v("model.head_dim") or -(-hidden // heads)),
    }
    for setting, rows in others.items():
        if hidden * rows > MOST_ELEMENTS:
            yield Fault(setting, v(setting), f"makes a matrix of more than 2^58 elements with hidden_size = {hidden}")


def _tp_divides_heads(v: Lookup) -> Iterator[Fault]:
    tp, heads = v("parallel.tp"), v("model.num_attention_heads")
    if heads % tp:
        message = f"does not divide model.num_attention_heads = {heads}; possible: {divisors(heads)}"
        yield Fault("parallel.tp", tp, message)


def _tp_fits_key_values(v: Lookup) -> Iterator[Fault]:
    tp, kv = v("parallel.tp"), v("model.num_key_value_heads")
    if kv % tp and tp % kv:
        yield Fault("parallel.tp", tp, f"must divide model.num_key_value_heads = {kv}, or be a multiple of it")


def _tp_divides_feed_forward(v: Lookup) -> Iterator[Fault]:
    tp, size = v("parallel.tp"), v("model.intermediate_size")
    if size % tp:
        yield Fault("parallel.tp", tp, f"does not divide model.intermediate_size = {size}")


def _lengths(v: Lookup) -> Iterator[tuple[str, int]]:
    """Every sequence length, with its setting."""
    yield "train.sequence_length", v("train.sequence_length")
    for i, phase in enumerate(v("data.phases")):
        if phase.sequence_length:
            yield f"data.phases[{i}].sequence_length", phase.sequence_length


def _timeline(v: Lookup) -> Timeline:
    phases = phases_of(v("data.phases"), v("train.sequence_length"))
    ramp = v("train.batch_ramp")
    if not _ascends(ramp):
        raise _Unsound
    return Timeline(phases, batch_sizes_of(v("train.global_batch_size"), ramp))


def _steps(v: Lookup) -> int:
    """Of the run; 0 where its length is given wrongly."""
    return run_length(_timeline(v), v("train.steps"), v("train.tokens"))


def _cp_divides_sequence(v: Lookup) -> Iterator[Fault]:
    cp, tp = v("parallel.cp"), v("parallel.tp")
    splits = tp > 1 and v("parallel.sequence_parallel") is not False
    unit = sequence_unit(cp, tp, splits)
    for setting, length in _lengths(v):
        if cp > 1 and length % unit:
            of = "2 × parallel.cp" + (", and of parallel.cp × parallel.tp" if splits else "")
            below, above = length // unit * unit, -(-length // unit) * unit
            nearest = f"{below} or {above}" if below else f"{above}"
            yield Fault(setting, length, f"must be a multiple of {of}, that is of {unit}; nearest: {nearest}")


def _cp_divides_heads(v: Lookup) -> Iterator[Fault]:
    """Only where heads are exchanged for tokens."""
    cp, tp, heads = v("parallel.cp"), v("parallel.tp"), v("model.num_attention_heads")
    if v("parallel.context_mode") == "alltoall" and heads % tp == 0 and heads // tp % cp:
        message = (
            f"does not divide the {counted(heads // tp, 'attention head')} of each tensor-parallel rank, "
            f'as parallel.context_mode = "alltoall" needs; possible: {divisors(heads // tp)}; '
            'or set parallel.context_mode to "ring" or "allgather"'
        )
        yield Fault("parallel.cp", cp, message)


def _tp_divides_sequence(v: Lookup) -> Iterator[Fault]:
    tp, on = v("parallel.tp"), v("parallel.sequence_parallel")
    for setting, length in _lengths(v):
        if v("parallel.cp") == 1 and on is not False and tp > 1 and length % tp:
            message = f"must be a multiple of parallel.tp = {tp}; or set parallel.sequence_parallel = false"
            yield Fault(setting, length, message)


def _sequence_parallel_needs_tp(v: Lookup) -> Iterator[Fault]:
    if v("parallel.sequence_parallel") and v("parallel.tp") == 1:
        yield Fault("parallel.sequence_parallel", True, "needs parallel.tp > 1, whose ranks split the sequence")


def _schedule_has_chunks(v: Lookup) -> Iterator[Fault]:
    name, chunks = choose(v("parallel.schedule"), v("parallel.vpp"))
    supported = SCHEDULES[name].chunks
    if chunks not in supported:
        others = [other for other, schedule in SCHEDULES.items() if chunks in schedule.chunks]
        message = f"must be {supported[0]} with parallel.schedule = {name}; schedules for {chunks}: {', '.join(others)}"
        yield Fault("parallel.vpp", chunks, message)


def _stages_have_layers(v: Lookup) -> Iterator[Fault]:
    layers, given = v("model.num_hidden_layers"), v("parallel.layers_per_stage")
    name, chunks = choose(v("parallel.schedule"), v("parallel.vpp"))
    if chunks not in SCHEDULES[name].chunks:
        return
    pp, stages = v("parallel.pp"), v("parallel.pp") * chunks
    what = ("parallel.pp", pp) if chunks == 1 else ("parallel.pp × parallel.vpp", stages)
    if stages > MOST_STAGES:
        yield Fault(*what, f"must be at most {MOST_STAGES:,} stages")
    elif given is None and stages > layers:
        yield Fault(*what, f"exceeds model.num_hidden_layers = {layers}: a stage would have no layers")
    elif stages > layers + 2:
        message = f"exceeds model.num_hidden_layers = {layers} by more than the first and the last stage, which may"
        yield Fault(*what, f"{message} have none")
    elif isinstance(given, list) and (len(given) != stages or sum(given) != layers):
        per = "" if chunks == 1 else f" = pp {pp} × vpp {chunks}"
        message = f"must list one layer count per stage ({stages}{per}), summing to {layers}"
        yield Fault("parallel.layers_per_stage", given, message)
    elif isinstance(given, list) and any(stage.is_empty for stage in Placement.loop(given).stages):
        yield Fault(
            "parallel.layers_per_stage",
            given,
            "must give each middle stage at least 1 layer",
        )


def _sequence_fits_model(v: Lookup) -> Iterator[Fault]:
    longest = v("model.max_position_embeddings")
    for setting, length in _lengths(v):
        if length > longest:
            yield Fault(setting, length, f"exceeds model.max_position_embeddings = {longest}")


def _scaling_is_a_band(v: Lookup) -> Iterator[Fault]:
    scaling = v("model.rope_scaling")
    if scaling is not None and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield Fault("model.rope_scaling.high_freq_factor", scaling.high_freq_factor, "must be above low_freq_factor")


def _headless_is_tied(v: Lookup) -> Iterator[Fault]:
    if v("model.headless") and not v("model.tie_word_embeddings"):
        message = "must be true with model.headless = true, whose outputs are compared with the token embedding"
        yield Fault("model.tie_word_embeddings", False, message)


def _z_loss_needs_a_vocabulary(v: Lookup) -> Iterator[Fault]:
    if v("model.headless") and v("train.z_loss"):
        message = "must be 0 with model.headless = true: no softmax over the vocabulary is made"
        yield Fault("train.z_loss", v("train.z_loss"), message)


def _one_length(v: Lookup) -> Iterator[Fault]:
    steps, tokens = v("train.steps"), v("train.tokens")
    if bool(steps) == bool(tokens) and (steps or not v("data.phases")):
        message = "set either train.steps or train.tokens" + (", not both" if steps else ", to at least 1")
        yield Fault("train.steps", steps, message)


def _schedule_fits(v: Lookup) -> Iterator[Fault]:
    warmup, cooldown = v("optim.warmup_steps"), v("optim.cooldown_steps")
    if v("optim.schedule") == "wsd" and not cooldown:
        yield Fault("optim.cooldown_steps", cooldown, 'must be at least 1 with optim.schedule = "wsd"')
    if v("optim.schedule") != "wsd" and cooldown:
        yield Fault("optim.cooldown_steps", cooldown, 'applies only to optim.schedule = "wsd"')
    steps = _steps(v)
    if steps and warmup + cooldown > steps:
        both = f"plus optim.cooldown_steps = {cooldown} " if cooldown else ""
        yield Fault("optim.warmup_steps", warmup, f"{both}exceeds the run's {counted(steps, 'step')}")


def _rates_are_ordered(v: Lookup) -> Iterator[Fault]:
    lr, least = v("optim.lr"), v("optim.min_lr")
    if least > lr:
        yield Fault("optim.min_lr", least, f"must not exceed optim.lr = {lr}")


def _momentum_is_muons(v: Lookup) -> Iterator[Fault]:
    name, momentum = v("optim.name"), v("optim.momentum")
    if name != "muon" and momentum != Optim.model_fields["momentum"].default:
        yield Fault("optim.momentum", momentum, 'applies only to optim.name = "muon"; AdamW has optim.betas')


def _shares(text: str) -> list[float] | None:
    """The three shares of ``data.split``; None if it is something else."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return shares if len(shares) == 3 and min(shares) >= 0 and 0 < sum(shares) < float("inf") else None


def _split_is_three_shares(v: Lookup) -> Iterator[Fault]:
    text = v("data.split")
    shares = _shares(text)
    if shares is None:
        yield Fault("data.split", text, 'must be three shares in quotes, such as "98,1,1"')
    elif shares[0] == 0:
        yield Fault("data.split", text, "must give the first share, of training, more than 0")


def _has_sources(v: Lookup, needs_data: bool) -> Iterator[Fault]:
    if needs_data and not v("data.sources") and not v("data.phases"):
        yield Fault("data.sources", None, 'is required: [{path = "prefix_text_document", weight = 1.0}, …]')


def _phases_are_a_plan(v: Lookup) -> Iterator[Fault]:
    phases = v("data.phases")
    if not phases:
        return
    if v("data.sources"):
        yield Fault("data.sources", None, "set either data.sources or data.phases, not both: a phase has its own")
    if v("data.order") == "megatron":
        yield Fault("data.order", "megatron", "does not support data.phases; set data.sources instead")
    names = [phase.name for phase in phases]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Fault("data.phases", name, "is the name of two phases; rename one")
    timeline, steps = _timeline(v), _steps(v)
    held = timeline.last_step(timeline.phases[-1])
    if steps > held:
        yield Fault(
            "data.phases",
            None,
            f"end after {counted(held, 'step')}, but the run has {steps:,}; add tokens to the last phase",
        )


def _sources_are_one_thing(v: Lookup) -> Iterator[Fault]:
    seen: dict[str, list[str]] = {}
    for i, phase in enumerate(v("data.phases")):
        for source in phase.sources:
            name = source_name(source) if source.paths else ""
            if name and seen.setdefault(name, source.paths) != source.paths:
                message = f"names other data than in an earlier phase ({', '.join(seen[name])}); use another name"
                yield Fault(f"data.phases[{i}].sources", name, message)


def _sources_are_named(v: Lookup) -> Iterator[Fault]:
    given = {setting: v(setting) for setting in ("data.sources", "data.validation")}
    given |= {f"data.phases[{i}].sources": phase.sources for i, phase in enumerate(v("data.phases"))}
    for setting, sources in given.items():
        if any(not source.paths for source in sources):
            yield Fault(setting, None, "has a source whose path is an empty list")
            continue
        names = [source_name(source) for source in sources]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Fault(setting, name, "is the name of two sources; set name = … in one of them")


def _evaluation_has_data(v: Lookup) -> Iterator[Fault]:
    held_out = v("data.validation") or (_shares(v("data.split")) or [0, 1])[1] > 0
    for setting in ("train.evaluate_every", "train.evaluate_first"):
        is_for_tasks = setting == "train.evaluate_first" and v("data.tasks")
        if v(setting) and not held_out and not is_for_tasks:
            message = 'needs a held-out set: data.validation, or a data.split such as "98,2,0"'
            yield Fault(setting, v(setting), message)


def _tasks_can_be_evaluated(v: Lookup) -> Iterator[Fault]:
    every, tasks = v("train.evaluate_tasks_every"), v("data.tasks")
    if every and not tasks:
        yield Fault("train.evaluate_tasks_every", every, "needs files of JSON lines: set data.tasks")
    if tasks and not v("data.tokenizer"):
        yield Fault("data.tasks", tasks, "needs the tokenizer of the sources, which encodes texts: set data.tokenizer")
    if tasks and v("model.headless"):
        yield Fault("data.tasks", tasks, "cannot be evaluated with model.headless, which gives tokens no probabilities")


def _skipped_ranges_are_ranges(v: Lookup) -> Iterator[Fault]:
    for text in v("train.skip_samples"):
        start, stop = map(int, text.split(":"))
        if start >= stop:
            yield Fault("train.skip_samples", text, "is an empty range: the second number must be the larger one")


def _mode_needs_a_folder(v: Lookup) -> Iterator[Fault]:
    if v("checkpoint.load_mode") != "continue" and v("checkpoint.load") in ("", "latest"):
        message = "needs a folder to load from: set checkpoint.load to it"
        yield Fault("checkpoint.load_mode", v("checkpoint.load_mode"), message)


def _local_checkpoints_have_a_place(v: Lookup) -> Iterator[Fault]:
    if v("checkpoint.local_every") and not v("checkpoint.local_dir"):
        message = "needs a folder on each node's own disk: set checkpoint.local_dir to it"
        yield Fault("checkpoint.local_every", v("checkpoint.local_every"), message)


def _retention_can_keep_something(v: Lookup) -> Iterator[Fault]:
    every, evaluate_every = v("checkpoint.every"), v("train.evaluate_every")
    for setting in ("checkpoint.keep_every", "checkpoint.keep_best"):
        if v(setting) and not v("checkpoint.keep"):
            yield Fault(setting, v(setting), "has no effect without checkpoint.keep: all checkpoints are kept")
    keep_every = v("checkpoint.keep_every")
    if every and keep_every % every:
        yield Fault("checkpoint.keep_every", keep_every, f"must be a multiple of checkpoint.every = {every}")
    if not v("checkpoint.keep_best"):
        return
    if not evaluate_every:
        message = "needs validation losses: set train.evaluate_every"
        yield Fault("checkpoint.keep_best", v("checkpoint.keep_best"), message)
    elif every and lcm(every, evaluate_every) > v("train.steps"):
        message = (
            f"finds no checkpoint before the last one whose step is evaluated: checkpoint.every = {every} and "
            f"train.evaluate_every = {evaluate_every} first meet at step {lcm(every, evaluate_every):,}"
        )
        yield Fault("checkpoint.keep_best", v("checkpoint.keep_best"), message)


def _cooldown_decays(v: Lookup) -> Iterator[Fault]:
    if v("checkpoint.load_mode") != "cooldown":
        return
    if v("optim.schedule") == "constant":
        yield Fault("optim.schedule", "constant", 'must decay with checkpoint.load_mode = "cooldown"')
    if v("optim.warmup_steps"):
        message = 'must be 0 with checkpoint.load_mode = "cooldown"; "model+optimizer+data" starts with a warmup'
        yield Fault("optim.warmup_steps", v("optim.warmup_steps"), message)


def _compiler_chooses(v: Lookup) -> Iterator[Fault]:
    if v("train.compile") and v("train.recompute") == "selective":
        message = "cannot be combined with train.compile, whose compiler chooses what is cheap to compute again"
        yield Fault("train.recompute", "selective", f'{message}; set "none" or "full"')


def _spikes_are_looked_for(v: Lookup) -> Iterator[Fault]:
    for key in ("window", "zscore"):
        value = v(f"guard.{key}")
        if v("guard.spikes") == "off" and value != Guard.model_fields[key].default:
            yield Fault(f"guard.{key}", value, 'applies only to guard.spikes = "report" or "skip"')


def _muon_loses_nothing(v: Lookup) -> Iterator[Fault]:
    if v("optim.name") == "muon" and v("optim.rounding") in ("nearest", "stochastic"):
        yield Fault("optim.rounding", v("optim.rounding"), 'must be "kahan" with optim.name = "muon"')


def _rounding_is_needed(v: Lookup) -> Iterator[Fault]:
    if v("optim.rounding") and v("train.precision") != "bf16-pure":
        message = 'applies only to train.precision = "bf16-pure"; others keep what an update would lose'
        yield Fault("optim.rounding", v("optim.rounding"), message)


def _ascends(ramp: Sequence[tuple[int, int]]) -> bool:
    return all(tokens < later for (tokens, _), (later, _) in pairwise(ramp))


def _ramp_ascends(v: Lookup) -> Iterator[Fault]:
    ramp = v("train.batch_ramp")
    if not _ascends(ramp):
        yield Fault("train.batch_ramp", ramp, "must list [tokens, sequences] by ascending numbers of tokens")


def _batch_sizes(v: Lookup) -> Iterator[tuple[str, int]]:
    """Every batch size, with its setting."""
    yield "train.global_batch_size", v("train.global_batch_size")
    for i, (_, sequences) in enumerate(v("train.batch_ramp")):
        yield f"train.batch_ramp[{i}]", sequences


def _batch_divides(v: Lookup) -> Iterator[Fault]:
    micro = v("train.micro_batch_size")
    for setting, batch in _batch_sizes(v):
        if batch % micro:
            yield Fault("train.micro_batch_size", micro, f"does not divide {setting} = {batch}")


def _ranks_fit(v: Lookup, world_size: int | None) -> Iterator[Fault]:
    if world_size is None:
        return
    tp, pp, cp = v("parallel.tp"), v("parallel.pp"), v("parallel.cp")
    ranks, names = tp * pp * cp, "parallel.tp × parallel.pp" + (" × parallel.cp" if cp > 1 else "")
    if world_size % ranks:
        message = f"does not divide the {counted(world_size, 'process', 'processes')} of this run"
        yield Fault(names, ranks, message + _worlds_that_fit(v, ranks, world_size))
        return
    dp, micro = world_size // ranks, v("train.micro_batch_size")
    for setting, batch in _batch_sizes(v):
        if batch % (dp * micro) and batch % micro == 0:
            message = f"must be a multiple of {counted(dp, 'data-parallel rank')} × train.micro_batch_size = {micro}"
            yield Fault(setting, batch, message + _worlds_that_fit(v, ranks, world_size))
    if dp % v("parallel.dp_replicate"):
        message = f"does not divide the {counted(dp, 'data-parallel rank')} of this run; possible: {divisors(dp)}"
        yield Fault("parallel.dp_replicate", v("parallel.dp_replicate"), message)


def _worlds_that_fit(v: Lookup, ranks: int, world_size: int) -> str:
    """Numbers of processes near this one that layout and batch allow: a restart may have fewer or more."""
    per_rank, rest = divmod(gcd(*(batch for _, batch in _batch_sizes(v))), v("train.micro_batch_size"))
    dps = [dp for dp in range(1, per_rank + 1) if per_rank % dp == 0 and dp % v("parallel.dp_replicate") == 0]
    if rest or not dps:
        return ""
    near = sorted(sorted((ranks * dp for dp in dps), key=lambda world: abs(world - world_size))[:MOST_WORLDS])
    return f"; numbers of processes that fit: {', '.join(map(str, near))}"


RULES: tuple[Rule, ...] = (
    _heads_share_keys,
    _heads_have_a_width,
    _tp_divides_heads,
    _tp_fits_key_values,
    _tp_divides_feed_forward,
    _matrices_can_be_counted,
    _tp_divides_sequence,
    _cp_divides_sequence,
    _cp_divides_heads,
    _sequence_parallel_needs_tp,
    _schedule_has_chunks,
    _stages_have_layers,
    _sequence_fits_model,
    _scaling_is_a_band,
    _headless_is_tied,
    _z_loss_needs_a_vocabulary,
    _one_length,
    _schedule_fits,
    _rates_are_ordered,
    _momentum_is_muons,
    _split_is_three_shares,
    _sources_are_named,
    _phases_are_a_plan,
    _sources_are_one_thing,
    _evaluation_has_data,
    _tasks_can_be_evaluated,
    _skipped_ranges_are_ranges,
    _mode_needs_a_folder,
    _local_checkpoints_have_a_place,
    _retention_can_keep_something,
    _cooldown_decays,
    _compiler_chooses,
    _spikes_are_looked_for,
    _rounding_is_needed,
    _muon_loses_nothing,
    _ramp_ascends,
    _batch_divides,
)
