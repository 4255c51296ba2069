"""What a recipe changes of what a checkpoint was trained with: what is refused, and what applies from here on.

Refused is what would make the result wrong: other weights than the model's, other samples than were counted. What only
says how the weights are used from here on, the context's length and the rotary wavelengths, may change where the
recipe asks for it, and the vocabulary may grow. All other settings may change; ``start.py`` lists them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megagap.checkpoint.state import RunState
from megagap.config import Model, Settings, Train, timeline_of, timeline_of_data
from megagap.data.skipping import SampleNumbers
from megagap.errors import CheckpointError
from megagap.model.shapes import vocabulary_tensors
from megagap.resume.differences import Change, differences
from megagap.timeline import Phase, Timeline
from megagap.training.datasets import skipped_ranges

# Beside the model, the settings that say which samples are trained on, and whose moments there are: they may not change
# when a run resumes.
_FIXED: dict[str, tuple[str, ...]] = {
    "data": ("split", "order"),
    "train": ("seed",),
    "optim": ("name",),
}
_FREE = {"preset", "initializer_range"}

_IS_DEFAULT = ", the default: set it to the value you mean"
"""Nobody asks for another model by leaving a setting out."""

_FROM_HERE_ON = ("max_position_embeddings", "rope_theta", "rope_scaling")
"""Settings of the model that may change, whatever the weights were trained with: later steps are computed with the new
value. ``vocab_size`` may grow."""


def refuse_changes(saved: RunState, settings: Settings, folder: Path) -> None:
    """Raises :class:`CheckpointError` listing every setting that says what is trained on what, and differs."""
    same_theta = saved.model.model_copy(update={"rope_theta": settings.model.rope_theta})  # phases tell
    before = saved.model_copy(update={"model": same_theta}).model_dump(mode="json")
    of_model = _refused_model_differences(same_theta, settings.model)
    refused = of_model + _differences(before, settings, _FIXED) + _past_differences(saved, settings)
    steps = saved.train.steps, settings.train.steps
    if settings.data.order == "megatron" and steps[0] != steps[1]:
        refused.append(f"{Change('train.steps', *steps)}: Megatron's order depends on it")
    then, now = (_skipped(train, saved.last_sample) for train in (saved.train, settings.train))
    if then != now:
        refused.append(
            f"train.skip_samples: up to {saved.last_sample} it skipped {then or 'none'}, now {now or 'none'}; "
            "only later numbers can be skipped"
        )
    _refuse(
        refused,
        folder,
        "another run",
        "restore these settings, or choose another run.dir"
        + ("." if of_model else "; or take only the weights: --checkpoint.load_mode model"),
    )


def _refused_model_differences(saved: Model, now: Model) -> list[str]:
    """Every setting of the model with another value than the weights allow."""
    before, after = saved.model_dump(mode="json"), now.model_dump(mode="json")
    refused = []
    for name in after:
        line = str(Change(f"model.{name}", before[name], after[name]))
        if name in _FREE or before[name] == after[name]:
            continue
        if name in _FROM_HERE_ON:
            if name not in now.model_fields_set:
                refused.append(f"{line}{_IS_DEFAULT}")
        elif name == "vocab_size":
            if saved.vocab_size > now.vocab_size:
                refused.append(f"{line}: it can only grow; its last tokens would be lost")
        else:
            refused.append(line)
    return refused


def model_changes(saved: Model, now: Model, theta: bool = False) -> list[Change]:
    """What is changed of a checkpoint's model from here on. ``theta``: ``rope_theta`` too, which the phases determine
    where a run resumes."""
    names = [name for name in (*_FROM_HERE_ON, "headless") if theta or name != "rope_theta"]
    before, after = saved.model_dump(mode="json"), now.model_dump(mode="json")
    changes = [Change(f"model.{name}", before[name], after[name]) for name in names if before[name] != after[name]]
    if now.vocab_size > saved.vocab_size:
        count = now.vocab_size - saved.vocab_size
        rows = "1 new row" if count == 1 else f"{count} new rows"
        note = f": {rows} of {' and of '.join(vocabulary_tensors(now))} start from the initial weights of train.seed"
        changes.append(Change("model.vocab_size", saved.vocab_size, now.vocab_size, note))
    return changes


def precision_changes(saved: Train, now: Train, stored: torch.dtype, kept: torch.dtype) -> list[Change]:
    """Whether another precision applies from here on, and what that does to weights that are ``stored`` in one dtype
    and ``kept`` in another (masters, where there are some)."""
    if saved.precision == now.precision:
        return []
    if stored.itemsize > kept.itemsize:
        note = f": weights are rounded to the nearest {_name(kept)} number, and moments to what they are kept in"
    elif stored.itemsize < kept.itemsize:
        note = f": masters start from the {_name(stored)} weights, exactly"
    else:
        note = ": weights are taken over exactly"
    if now.precision == "fp16-mixed":
        note += "; the loss scale starts anew"
    return [Change("train.precision", saved.precision, now.precision, note)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _past_differences(saved: RunState, settings: Settings) -> list[str]:
    """What differs between the phases and batch sizes up to the saved step; later ones may change."""
    if refused := _batch_differences(saved, settings):
        return refused
    then, now = _both_pasts(saved, settings)
    if [phase["steps"] for phase in then] != [phase["steps"] for phase in now]:
        borders = [", ".join(f"{phase['name']} {phase['steps']:,}" for phase in past) for past in (then, now)]
        return [f"data.phases: the steps made were {borders[0]}; are now {borders[1]}; only later phases can change"]
    own = (("sequence_length", "train.sequence_length"), ("sources", "data.sources"))
    refused = [
        str(change)
        for i, (old, new) in enumerate(zip(then, now, strict=True))
        for key, single in own
        for change in differences(
            old[key],
            new[key],
            f"data.phases[{i}].{key}" if settings.data.phases else single,
        )
    ]
    return refused + [str(change) for change, asked in _theta_differences(then, now, settings) if not asked]


def _batch_differences(saved: RunState, settings: Settings) -> list[str]:
    then = _batch_sizes(timeline_of_data(saved.data, saved.train), saved.step)
    timeline = timeline_of(settings)
    now = _batch_sizes(timeline, saved.step)
    if then == now or not saved.step:
        return []
    before, ramp = saved.train, [list(entry) for entry in saved.train.batch_ramp if entry[0] < saved.consumed_tokens]
    wanted = timeline.at(saved.step + 1).samples
    return [
        f"train.global_batch_size, train.batch_ramp: the steps made had {_listed(then)}; are now {_listed(now)}; only "
        f"later ones can change: train.global_batch_size = {before.global_batch_size}, "
        f"train.batch_ramp = {[*ramp, [saved.consumed_tokens, wanted]]}"
    ]


def _batch_sizes(timeline: Timeline, step: int) -> list[tuple[int, int]]:
    """The first step of each batch size among the first ``step`` steps, and the sequences of its steps."""
    sizes: list[tuple[int, int]] = []
    for stretch in timeline.stretches:
        if stretch.steps < step and (not sizes or sizes[-1][1] != stretch.batch_size):
            sizes.append((stretch.steps + 1, stretch.batch_size))
    return sizes


def _listed(sizes: list[tuple[int, int]]) -> str:
    first, *later = sizes
    return ", ".join([f"{first[1]} sequences", *(f"{size} from step {step:,}" for step, size in later)])


def _theta_differences(
    then: list[dict[str, Any]], now: list[dict[str, Any]], settings: Settings
) -> list[tuple[Change, bool]]:
    """How rotary wavelengths of the past differ, and whether that is asked for: what ``model.rope_theta`` says applies
    from here on, what a phase says of itself applies from its start."""
    asked = "rope_theta" in settings.model.model_fields_set
    return [
        (
            Change(
                f"{f'data.phases[{i}]' if settings.data.phases else 'model'}.rope_theta",
                old["rope_theta"],
                new["rope_theta"],
                "" if asked else _IS_DEFAULT,
            ),
            asked and new["rope_theta"] == settings.model.rope_theta,
        )
        for i, (old, new) in enumerate(zip(then, now, strict=True))
        if old["rope_theta"] != new["rope_theta"]
    ]


def past_changes(saved: RunState, settings: Settings) -> list[Change]:
    """The rotary wavelengths that are others from here on."""
    return [change for change, _ in _theta_differences(*_both_pasts(saved, settings), settings)]


def _both_pasts(saved: RunState, settings: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The phases up to the saved step, as they were and as the settings have them now."""
    return (
        _past(timeline_of_data(saved.data, saved.train, saved.model.rope_theta), saved.step),
        _past(timeline_of(settings), saved.step),
    )


def _skipped(train: Train, last: int | None) -> list[tuple[int, int]]:
    """The ranges of numbers up to sample ``last`` that are left out."""
    ranges = SampleNumbers(skipped_ranges(train)).skipped
    return [(start, min(stop, last + 1)) for start, stop in ranges if start <= last] if last is not None else []


def _past(timeline: Timeline, step: int) -> list[dict[str, Any]]:
    """The phases of the first ``step`` steps; neighbours that differ in their names only are one."""
    past: list[dict[str, Any]] = []
    for phase in timeline.phases:
        last = step if phase.tokens is None else min(step, timeline.last_step(phase))
        steps = last - timeline.first_step(phase) + 1
        if steps <= 0:
            break
        own = _described(phase)
        if past and own == {key: past[-1][key] for key in own}:
            past[-1]["steps"] += steps
        else:
            past.append({"name": phase.name, "steps": steps, **own})
    return past


def _described(phase: Phase) -> dict[str, Any]:
    """What determines a phase's samples, and its wavelengths. Files may move: sources have no paths."""
    sources = [{"weight": source.weight, "name": source.name} for source in phase.sources]
    return {"sequence_length": phase.sequence_length, "rope_theta": phase.rope_theta, "sources": sources}


def refuse_another_model(model: Model, settings: Settings, folder: Path) -> None:
    """Raises :class:`CheckpointError` listing what differs between a checkpoint's model and the recipe's.

    The recipe may ask for a headless model, or for one that no longer is: the weights are the same.
    """
    if "headless" in settings.model.model_fields_set:
        model = model.model_copy(update={"headless": settings.model.headless})
    _refuse(
        _refused_model_differences(model, settings.model),
        folder,
        "another model",
        "make the recipe's model like it, or load another folder",
    )


def _refuse(refused: list[str], folder: Path, whose: str, cure: str) -> None:
    if refused:
        lines = [f"  {line}" for line in refused]
        raise CheckpointError("\n".join([f"{folder} belongs to {whose}:", *lines, f"  {cure}."]))


def _differences(saved: dict[str, Any], settings: Settings, compared: Mapping[str, Sequence[str]]) -> list[str]:
    now = settings.model_dump(mode="json")
    return [
        str(Change(f"{section}.{key}", saved[section][key], now[section][key]))
        for section, keys in compared.items()
        for key in keys
        if saved[section][key] != now[section][key]
    ]
