"""An index is untrusted input: its state is used only if it is typed and consistent with itself and the tensors."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megagap.checkpoint import Index, load_model, save_checkpoint
from megagap.checkpoint.state import RunState, read_model, read_run
from megagap.errors import CheckpointError
from megagap.model.shapes import model_tensors
from megagap.parallel.shard import Slice, whole
from tests.models import SCALING, tiny_model

STATE: dict[str, Any] = {
    "step": 3,
    "updates": 2,
    "consumed_samples": 12,
    "consumed_tokens": 96,
    "last_sample": 13,
    "model": tiny_model(rope_scaling=SCALING).model_dump(mode="json"),
    "data": {"tokenizer": "", "sources": [{"path": ["/a/fr_text_document"], "weight": 0.5, "name": "fr"}]},
    "train": {"steps": 5, "global_batch_size": 4, "sequence_length": 8, "skip_samples": ["3:5"]},
    "parallel": {"tp": 2, "unknown to us": 1},
}


def save_state(folder: Path, state: dict[str, Any]) -> Index:
    """A checkpoint of the tiny model's weights that says this of its run."""
    parts = [
        Slice("weight", whole(name, shape), 0, whole(name, shape).numel, torch.zeros(shape).view(-1))
        for name, shape in model_tensors(tiny_model()).items()
    ]
    save_checkpoint(folder, parts, state)
    return Index.read(folder)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The state with one field, named with dots, set to ``value`` or, if that is ``...``, left out."""
    state = copy.deepcopy(STATE)
    *parents, key = path.split(".")
    table = state
    for parent in parents:
        table = table[parent]
    if value is ...:
        del table[key]
    else:
        table[key] = value
    return state


def test_a_valid_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    index = save_state(tmp_path / "step_3", STATE)
    run = read_run(tmp_path / "step_3", index)
    assert (run.step, run.updates, run.last_sample, run.train.steps) == (3, 2, 13, 5)
    assert run.model == read_model(tmp_path / "step_3", index) == tiny_model(rope_scaling=SCALING)
    assert load_model(tmp_path / "step_3").settings == run.model


@pytest.mark.parametrize("field", ["step", "updates", "consumed_samples", "consumed_tokens", "last_sample"])
@pytest.mark.parametrize("value", [-1, 1.0, True, "3", [], 2**61], ids=repr)
def test_progress_that_is_not_a_count_is_refused_naming_folder_and_field(
    tmp_path: Path, field: str, value: Any
) -> None:
    index = save_state(tmp_path / "step_3", changed(field, value))
    with pytest.raises(CheckpointError, match=rf"step_3/index\.json: state\.{field}: "):
        read_run(tmp_path / "step_3", index)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("step", ..., "state.step: Field required"),
        ("updates", ..., "state.updates: Field required"),
        ("consumed_samples", ..., "state.consumed_samples: Field required"),
        ("consumed_tokens", ..., "state.consumed_tokens: Field required"),
        ("last_sample", ..., "last_sample = None after consumed_samples = 12"),
        ("updates", 4, "updates = 4 exceeds step = 3"),
        ("step", 4, "consumed_samples = 12, but 4 steps made it 16"),
        ("consumed_tokens", 95, "consumed_tokens = 95, but 12 samples made it 96"),
        ("model", ..., "state.model: Field required"),
        ("data", "x", "state.data: "),
        ("data.sources", [{"path": 3}], "state.data.sources.0.path"),
        ("train", ..., "holds only a model"),
        ("train", [], "state.train: "),
        ("train.seed", -1, "state.train.seed: "),
        ("train.global_batch_size", ..., "state.train.global_batch_size: "),
        ("train.skip_samples", ["x"], "state.train.skip_samples.0: "),
        ("train.skip_samples", ["5:3"], "train.skip_samples = 5:3 is an empty range"),
    ],
    ids=lambda value: "missing" if value is ... else None,
)
def test_a_state_that_no_run_can_resume_from_is_refused(tmp_path: Path, field: str, value: Any, complaint: str) -> None:
    index = save_state(tmp_path / "step_3", changed(field, value))
    with pytest.raises(CheckpointError) as error:
        read_run(tmp_path / "step_3", index)
    assert "step_3" in str(error.value) and complaint in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("num_hidden_layers", 10**9, "state.model.num_hidden_layers = 1000000000, but it contains 21 weights"),
        ("num_hidden_layers", 3, "does not contain weight of model.layers.2"),
        ("num_hidden_layers", 1, "holds model.layers.1"),
        ("hidden_size", 10**12, "has shape"),
        ("vocab_size", 10**15, "has shape"),
        ("head_dim", 10**4000, "state.model.head_dim: "),
        ("num_key_value_heads", 3, "state.model.num_key_value_heads = 3 does not divide"),
        ("rope_theta", 0.0, "state.model.rope_theta: "),
        ("rope_scaling", {"rope_type": "llama3"}, "state.model.rope_scaling.factor: "),
        ("tie_word_embeddings", 1, "state.model.tie_word_embeddings: "),
        ("num_experts", 4, "state.model.num_experts: "),
    ],
)
def test_a_model_that_its_own_tensors_do_not_fit_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any, complaint: str
) -> None:
    save_state(tmp_path / "step_3", changed(f"model.{field}", value))
    monkeypatch.setattr("megagap.checkpoint.model.build_whole", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "step_3")
    assert "step_3" in str(error.value) and complaint in str(error.value)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5), st.just([]), st.just({}), st.sampled_from([0, 1, 2, 3, 4, 8, 16, 10**9]),
)  # fmt: skip


FIELDS = [*STATE, *(f"{section}.{key}" for section in ("model", "train", "data") for key in STATE[section])]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return save_state(tmp_path_factory.mktemp("checkpoint") / "c", STATE)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(field="model.num_attention_heads", value=2**53)
@given(field=st.sampled_from(FIELDS), value=JUNK)
def test_any_junk_in_a_field_is_refused_or_harmless(index: Index, field: str, value: Any) -> None:
    tampered = index.model_copy(update={"state": changed(field, value)})
    try:
        assert isinstance(read_run(Path("c"), tampered), RunState)
    except CheckpointError:
        return
    model = read_model(Path("c"), tampered)
    assert model_tensors(model) == model_tensors(tiny_model())
