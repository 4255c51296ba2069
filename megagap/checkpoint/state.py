"""What a checkpoint says about the run that wrote it: the ``state`` of its index, checked.

It is untrusted input, as the rest of the index is: every number is typed and bounded, the model's settings fit each
other and the tensors that are stored, before anything is built from them.
"""

from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megagap.checkpoint.index import INDEX_NAME, Index, unusable
from megagap.config import Data, Model, Train, check_rules, timeline_of_data
from megagap.data.agreement import Ids
from megagap.errors import CheckpointError, counted
from megagap.model.shapes import model_tensors

_Count = Annotated[int, Field(ge=0, le=2**60)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    # What else the state holds (layout, logging, …) says how a run was made, and decides nothing.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class IdsState(_Part):
    """What the data said of the token ids (:class:`megagap.data.agreement.Ids`)."""

    vocab_size: _Count
    fingerprint: str
    bos: _Count | None
    eod: _Count | None


class ModelState(_Part):
    """The state that every checkpoint has."""

    model: Model
    """As last trained: with the ``rope_theta`` of the phase."""
    recipe_rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """``model.rope_theta`` of the recipe, which holds in phases that have none of their own."""
    ids: IdsState | None = None


class Progress(_Part):
    """How far a run has got."""

    step: _Count
    """Updates asked for, skipped ones included."""
    updates: _Count
    """Updates made."""
    consumed_samples: _Count
    consumed_tokens: _Count
    schedule_origin: _Count = 0
    """The steps after which the learning-rate schedule began: those of the run that this one branched off."""
    last_sample: _Count | None = None
    """Global number of the last sample; None before the first."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.updates > self.step:
            raise ValueError(f"updates = {self.updates} exceeds step = {self.step}")
        if self.schedule_origin > self.step:
            raise ValueError(f"schedule_origin = {self.schedule_origin} exceeds step = {self.step}")
        if (self.last_sample is None) != (self.consumed_samples == 0):
            raise ValueError(f"last_sample = {self.last_sample} after consumed_samples = {self.consumed_samples}")
        return self


class OptimState(_Part):
    """What the moments are those of."""

    name: str = "adamw"


class RunState(ModelState, Progress):
    """What a checkpoint of a run holds, from which the run can continue."""

    data: Data
    train: Train
    optim: OptimState = OptimState()
    identities: dict[str, list[dict[str, Any]]] = {}
    """By source: what distinguishes each of its shards from a rebuilt one."""
    guard_history: list[Annotated[list[_Finite], Field(min_length=2, max_length=2)]] = []
    """[loss, gradient norm] of the last accepted steps that spikes are told from, oldest first; none where they were
    not looked for."""

    loss_scale: Annotated[list[_Finite], Field(max_length=2)] = []
    """Of `fp16-mixed`: the factor, and how many steps it has fitted."""

    @model_validator(mode="after")
    def _counts_steps(self) -> Self:
        for fault in check_rules({"train.skip_samples": self.train.skip_samples}, None):
            raise ValueError(f"{fault.setting} = {fault.value} {fault.message}")
        last = timeline_of_data(self.data, self.train).at(self.step)
        samples, tokens = last.consumed_samples, last.consumed_tokens
        if self.consumed_samples != samples:
            steps = counted(self.step, "step")
            raise ValueError(f"consumed_samples = {self.consumed_samples}, but {steps} made it {samples}")
        if self.consumed_tokens != tokens:
            raise ValueError(f"consumed_tokens = {self.consumed_tokens}, but {samples} samples made it {tokens}")
        return self


def state_of_model(model: Model, tokenizer: str | None) -> dict[str, Any]:
    """The state of a checkpoint that is a model, at step 0 of no run."""
    progress = {"step": 0, "updates": 0, "consumed_samples": 0, "consumed_tokens": 0}
    return {**progress, "model": model.model_dump(mode="json"), "data": {"tokenizer": tokenizer or ""}}


_State = TypeVar("_State", bound=_Part)


def read_model(folder: Path, index: Index) -> Model:
    """The model's settings, which all tensors of kind ``weight`` fit.

    Raises :class:`CheckpointError` naming the folder and the field.
    """
    return _sound(folder, index, _validated(folder, index, ModelState).model)


def read_recipe_model(folder: Path, index: Index) -> Model:
    """:func:`read_model`, but as the recipe had it: phases may train with another ``rope_theta`` meanwhile."""
    model, theta = read_model(folder, index), _validated(folder, index, ModelState).recipe_rope_theta
    return model.model_copy(update={"rope_theta": theta}) if theta else model


def read_ids(folder: Path, index: Index) -> Ids | None:
    """What the checkpoint declares about the token ids, if anything.

    Raises :class:`CheckpointError` naming the folder and the field.
    """
    ids = _validated(folder, index, ModelState).ids
    return Ids(f"the checkpoint {folder}", **ids.model_dump()) if ids else None


def read_run(folder: Path, index: Index) -> RunState:
    """All that a run continues from. Raises :class:`CheckpointError` naming the folder and the field."""
    if "train" not in index.state:
        raise CheckpointError(
            f'{folder} holds only a model, not a run to continue\n  start from it with checkpoint.load_mode = "model".'
        )
    state = _validated(folder, index, RunState)
    return state.model_copy(update={"model": _sound(folder, index, state.model)})


def _validated(folder: Path, index: Index, kind: type[_State]) -> _State:
    try:
        return kind.model_validate(index.state)
    except ValidationError as error:
        raise unusable(folder, error, "state") from None


def _sound(folder: Path, index: Index, model: Model) -> Model:
    for fault in check_rules({f"model.{name}": value for name, value in model}, None):
        raise CheckpointError(f"{folder}/{INDEX_NAME}: state.{fault.setting} = {fault.value} {fault.message}")
    model = model.model_copy(update={"head_dim": model.head_dim or model.hidden_size // model.num_attention_heads})
    check_tensors(folder, index, model)
    return model


def check_tensors(checkpoint: Path, index: Index, model: Model) -> dict[str, tuple[int, ...]]:
    """:func:`model_tensors`, all of which and no others the checkpoint holds; else :class:`CheckpointError`."""
    stored = index.names("weight")
    if model.num_hidden_layers > len(stored):  # before as many names are made
        raise CheckpointError(
            f"{checkpoint}/{INDEX_NAME}: state.model.num_hidden_layers = {model.num_hidden_layers}, "
            f"but it contains {counted(len(stored), 'weight')}"
        )
    wanted = model_tensors(model)
    unknown = sorted(set(stored) - set(wanted))
    if unknown:
        raise CheckpointError(f"{checkpoint} holds {unknown[0]}, which does not belong to the model of its settings")
    for name, shape in wanted.items():
        found = index.tensor(checkpoint, "weight", name).shape
        if found != shape:
            raise CheckpointError(f"{checkpoint}: {name} has shape {list(found)}, but its settings say {list(shape)}")
    return wanted
