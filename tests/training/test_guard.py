"""The guard: what is not finite reaches nothing, spikes are found alike in every layout and after a restart, and a rank
that computes wrongly is named."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megagap.config import load_recipe
from megagap.data.indexed import IndexedDatasetWriter
from megagap.errors import ConfigError, DivergedError
from megagap.observe.metrics import read_metrics
from megagap.optim.gradient_store import _Place
from megagap.training import step as training_step
from megagap.training.datasets import training_data
from megagap.training.guard import NORMAL, History, StepGuard, require_repeatable
from tests.recipes import VOCABULARY, write_recipe
from tests.training_run import train_recipe

LAYOUTS = {
    "dp2": [],
    "dp2, zero 2": ["optim.zero=2"],
    "dp2, zero 3": ["optim.zero=3"],
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2"],
    "cp2": ["parallel.cp=2"],
}

WEIGHT = "model.layers.1.mlp.down_proj.weight"
"""Of the second of two layers, which the second rank has in each layout."""


def events(run: Path, name: str) -> list[dict]:
    records = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == name]


# -- what is not finite


def damaging(at: int, microbatch: int, damage: Callable[[torch.Tensor], None], passes: int = 1):
    """compute_gradients, after which at step ``at`` one microbatch's gradient of WEIGHT is damaged, of the first
    ``passes`` computations of the step."""
    compute, add = training_step.compute_gradients, _Place.add_product
    made = []

    def computing(state, *rest, **others):
        made.append(state.step)
        calls = []

        def adding(place, left, right, *following):
            add(place, left, right, *following)
            if place.parameter.shard.name == WEIGHT:
                calls.append(place)
                if len(calls) == microbatch:
                    damage(place.gradient.view(-1)[3:4])

        if state.step == at and made.count(at) <= passes:
            _Place.add_product = adding
        try:
            return compute(state, *rest, **others)
        finally:
            _Place.add_product = add

    computing.made = made
    return computing


def set_nan(element: torch.Tensor) -> None:
    element.fill_(torch.nan)


def flip_one_bit(element: torch.Tensor) -> None:
    """Not the last, which the sum with other microbatches may round away."""
    element.view(torch.int32)[0] ^= 1 << 12


def train_damaged(rank, ranks, recipe, overrides, at, damage, damaged_rank=1, passes=1):
    """Returns how often the gradients of each step were computed on this rank."""
    compute = training_step.compute_gradients
    if rank == damaged_rank:
        training_step.compute_gradients = damaging(at, 2, damage, passes)
    else:
        training_step.compute_gradients = damaging(0, 0, damage)
    try:
        train_recipe(rank, ranks, recipe, overrides)
        return training_step.compute_gradients.made
    finally:
        training_step.compute_gradients = compute


def train_refusing(rank, ranks, recipe, overrides, refused):
    """The update of step ``refused`` is not made, for no reason."""
    judge, step = StepGuard.judge, training_step.compute_gradients
    current = []

    def computing(state, *rest, **others):
        current[:] = [state.step]
        return step(state, *rest, **others)

    def judging(*arguments):
        verdict = judge(*arguments)
        accepted = verdict.accepted & torch.tensor(current != [refused])
        return type(verdict)(accepted, verdict.spike, verdict.zscores)

    training_step.compute_gradients, StepGuard.judge = computing, judging
    try:
        train_recipe(rank, ranks, recipe, overrides)
    finally:
        training_step.compute_gradients, StepGuard.judge = step, judge


def stored(run: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / f"checkpoints/step_{step:08}").glob("*.safetensors")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_in_one_ranks_gradient_is_as_if_the_update_had_not_been_asked_for(workers, tmp_path, layout):
    recipe = write_recipe(tmp_path, model={"num_hidden_layers": 2}, train={"steps": 5})
    nan, without = tmp_path / "nan", tmp_path / "without"
    workers.run(2, train_damaged, recipe, [*LAYOUTS[layout], f"run.dir={nan}"], 3, set_nan)
    workers.run(2, train_refusing, recipe, [*LAYOUTS[layout], f"run.dir={without}"], 3)
    after, expected = (read_metrics(run / "metrics.jsonl") for run in (nan, without))
    assert [record["skipped"] for record in after] == [False, False, True, False, False]
    assert after[2]["grad_norm"] is None and expected[2]["grad_norm"] is not None
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in after[3:]] == [record[key] for record in expected[3:]]
    files = stored(nan, 5)
    assert len(files) == 2 and files == stored(without, 5)
    (event,) = events(nan, "skipped_step")
    assert (event["step"], event["reason"]) == (3, "loss or gradient norm not finite")
    assert event["samples"] == ["16:24"] and (nan / event["batch"]).is_file()


# -- spikes


def test_zscores_are_those_of_numpys_median_and_deviations():
    generator = np.random.default_rng(0)
    history, kept = History(5, torch.device("cpu")), []
    for number in range(14):
        values = generator.normal(3, 1, 2).astype(np.float32)
        scores = history.zscores(torch.tensor(values)).numpy()
        if len(kept) < 5:
            assert np.isnan(scores).all()
        else:
            window = np.array(kept[-5:])
            middle = np.median(window, axis=0)
            expected = (values - middle) / (NORMAL * np.median(np.abs(window - middle), axis=0))
            np.testing.assert_allclose(scores, expected, rtol=1e-4)
        accepted = number % 4 != 3
        history.add(torch.tensor(values), torch.tensor(accepted))
        if accepted:
            kept.append(values)


def test_rounding_of_constant_numbers_is_no_spike():
    history = History(4, torch.device("cpu"))
    for _ in range(4):
        history.add(torch.tensor([2.0, 1.0]), torch.tensor(True))
    loss, norm = history.zscores(torch.tensor([2.0 + 2e-6, 1.1])).tolist()
    assert 0 < loss < 0.1 and norm > 100


@pytest.mark.parametrize("window", [4, 7, 20])
@pytest.mark.parametrize("steps", [0, 3, 7, 16])
def test_the_state_of_a_history_holds_its_newest_steps_in_order(window: int, steps: int):
    first, second = History(7, torch.device("cpu")), History(window, torch.device("cpu"))
    pairs = [[float(step), step / 2] for step in range(steps)]
    for pair in pairs:
        first.add(torch.tensor(pair), torch.tensor(True))
    assert first.state() == pairs[-7:]
    second.load_state(first.state())
    assert second.state() == pairs[-min(7, window) :]
    second.add(torch.tensor([99.0, 99.0]), torch.tensor(True))
    assert second.state() == [*pairs[-min(7, window) :], [99.0, 99.0]][-window:]


NOISE = 30
"""The document of random tokens among others that count up."""


@pytest.fixture(scope="module")
def spiky(tmp_path_factory) -> Path:
    """A recipe that soon learns its data, in which one document is noise."""
    folder = tmp_path_factory.mktemp("spiky")
    generator = np.random.default_rng(1)
    with IndexedDatasetWriter(str(folder / "counting_text_document"), np.dtype("uint16")) as writer:
        for document in range(130):
            noise, counting = generator.integers(VOCABULARY, size=120), np.arange(64) % 4
            writer.add_document(noise if document == NOISE else counting)
    return write_recipe(
        folder,
        model={"num_hidden_layers": 2},
        data={"sources": [{"path": "counting_text_document"}], "split": "100,0,0"},
        train={"steps": 30, "seed": 402},
        optim={"lr": 5e-3, "schedule": "constant"},
        checkpoint={"every": 4},
        guard={"spikes": "skip", "window": 6, "zscore": 10.0, "hash_every": 1},
    )


def noisy_steps(recipe: Path) -> list[int]:
    """After the window is full, the steps that read of the noise."""
    settings = load_recipe(recipe)
    data = training_data(settings)
    positions = range(6 * 8, settings.train.steps * 8)
    return sorted({position // 8 + 1 for position in positions if NOISE in data.sample(position).documents})


@pytest.fixture(scope="module")
def undisturbed(spiky, workers, tmp_path_factory) -> Path:
    """The run of one process."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    workers.run(1, train_recipe, spiky, [f"run.dir={run}"])
    return run


def decisions(run: Path) -> list[tuple]:
    keys = ("loss", "grad_norm", "loss_zscore", "grad_norm_zscore", "spike", "skipped")
    return [tuple(record[key] for key in keys) for record in read_metrics(run / "metrics.jsonl")]


def test_the_updates_of_noisy_batches_are_skipped_and_no_others(spiky, undisturbed):
    records, noisy = read_metrics(undisturbed / "metrics.jsonl"), noisy_steps(spiky)
    assert len(noisy) >= 2
    assert [record["step"] for record in records if record["skipped"]] == noisy
    assert [record["step"] for record in records if record["spike"]] == noisy
    assert all(record["loss_zscore"] is None for record in records[:6])


def test_the_event_of_a_spike_names_what_the_step_was_trained_on_and_its_batch_is_saved(spiky, undisturbed):
    step = noisy_steps(spiky)[0]
    event = events(undisturbed, "skipped_step")[0]
    assert (event["step"], event["reason"], event["in_a_row"]) == (step, "spike in loss or gradient norm", 1)
    assert event["loss_zscore"] > 10 and event["samples"] == [f"{8 * step - 8}:{8 * step}"]
    (source,) = event["sources"]
    assert source["source"] == "counting" and NOISE in source["documents"]
    assert source["files"] == [str(spiky.parent / "counting_text_document")]
    batch = np.load(undisturbed / event["batch"])
    assert np.array_equal(batch["tokens"], training_data(load_recipe(spiky)).batch(8 * step - 8, 8))
    assert batch["samples"].tolist() == list(range(8 * step - 8, 8 * step)) and set(batch["sources"]) == {"counting"}


def test_the_layer_with_the_largest_gradient_is_that_of_the_norms_by_layer(workers, spiky, undisturbed, tmp_path):
    step = noisy_steps(spiky)[0]
    ((layer, norm),) = workers.run(1, largest_layer, spiky, tmp_path, step)
    event = events(undisturbed, "skipped_step")[0]
    assert event["layer"] == layer and event["layer_grad_norm"] == pytest.approx(norm, rel=1e-5)


def largest_layer(rank, ranks, recipe, folder, at):
    compute, norms = training_step.compute_gradients, {}

    def computing(state, *rest, **others):
        work = compute(state, *rest, **others)
        if state.step == at and not norms:
            for bucket in state.optimizer.store.buckets:
                for part in bucket.slices("gradient", bucket.own_gradient):
                    name = part.shard.name.removeprefix("model.").removesuffix(".weight")
                    layer = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
                    norms[layer] = norms.get(layer, 0.0) + part.tensor.double().square().sum().item()
        return work

    training_step.compute_gradients = computing
    try:
        train_recipe(rank, ranks, recipe, [f"run.dir={folder / 'run'}", f"train.steps={at}"])
    finally:
        training_step.compute_gradients = compute
    largest = max(norms, key=norms.__getitem__)
    return largest, norms[largest] ** 0.5


@pytest.mark.parametrize("layout", ["dp2, zero 3", "tp2", "pp2", pytest.param("cp2", marks=pytest.mark.long)])
def test_every_layout_skips_the_same_steps(workers, spiky, tmp_path, layout):
    workers.run(2, train_recipe, spiky, [*LAYOUTS[layout], f"run.dir={tmp_path}"])
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if record["skipped"]] == noisy_steps(spiky)


def test_spikes_that_are_only_reported_are_updates(workers, spiky, tmp_path):
    workers.run(1, train_recipe, spiky, ["guard.spikes=report", f"run.dir={tmp_path}"])
    assert not any(record["skipped"] for record in read_metrics(tmp_path / "metrics.jsonl"))
    first = events(tmp_path, "spike")[0]
    assert first["step"] == noisy_steps(spiky)[0] and (tmp_path / first["batch"]).is_file()
    assert not events(tmp_path, "skipped_step")


def test_a_resumed_run_decides_as_the_undisturbed_one(workers, spiky, undisturbed, tmp_path):
    """The restart is at the step before a spike, whose verdict needs the history."""
    before = noisy_steps(spiky)[-1] - 1
    workers.run(1, train_recipe, spiky, [f"run.dir={tmp_path}", f"run.stop_after={before}"])
    workers.run(1, train_recipe, spiky, [f"run.dir={tmp_path}"])
    assert [event["step"] for event in events(tmp_path, "resume")] == [before]
    assert decisions(tmp_path) == decisions(undisturbed)


def test_a_spike_at_the_last_step_does_not_spoil_the_end(workers, spiky, tmp_path):
    last = noisy_steps(spiky)[-1]
    workers.run(1, train_recipe, spiky, [f"run.dir={tmp_path}", f"train.steps={last}"])
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["skipped"]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
    assert (tmp_path / f"checkpoints/step_{last:08}").is_dir()


def test_spikes_that_do_not_end_end_the_run_with_its_last_good_checkpoint(workers, spiky, tmp_path):
    """An update ruins the weights: all that follows is a spike, and finite."""
    workers.run(1, train_recipe, spiky, [f"run.dir={tmp_path}", "run.stop_after=18"])
    ruinous = ["optim.lr=0.5", "guard.max_skipped=2", f"run.dir={tmp_path}"]
    (message,) = workers.run(1, divergence, spiky, ruinous)
    assert "spike in loss or gradient norm for 3 steps in a row, up to step 22" in message
    assert f"The last good checkpoint is {tmp_path}/checkpoints/step_00000018" in message
    assert "raise guard.zscore" in message and '"144:176"' in message
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))[-1] == "step_00000018"


def divergence(rank, ranks, recipe, overrides) -> str:
    with pytest.raises(DivergedError) as caught:
        train_recipe(rank, ranks, recipe, overrides)
    return str(caught.value)


# -- computed twice


@pytest.mark.parametrize("layout", ["dp2", "dp2, zero 3", "tp2", "pp2", "cp2"])
def test_a_rank_that_computes_one_bit_wrongly_is_named_and_its_step_skipped(workers, tmp_path, layout):
    recipe = write_recipe(
        tmp_path, model={"num_hidden_layers": 2}, train={"steps": 5}, guard={"replay_every": 2, "max_skipped": 1}
    )
    made = workers.run(2, train_damaged, recipe, LAYOUTS[layout], 4, flip_one_bit)
    assert made == [[1, 2, 2, 3, 4, 4, 5, 5]] * 2, (
        "once in other steps; the last weights are tried before they are saved"
    )
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert {record["step"]: record["repeated"] for record in records if "repeated" in record} == {2: True, 4: False}
    assert [record["step"] for record in records if record["skipped"]] == [4]
    (event,) = events(tmp_path / "run", "skipped_step")
    assert (event["reason"], event["ranks"]) == ("two computations of the step differ", [1])


def test_computing_steps_twice_changes_nothing(workers, tmp_path):
    recipe = write_recipe(tmp_path, model={"num_hidden_layers": 2}, train={"steps": 4})
    for every in (0, 2):
        overrides = [f"guard.replay_every={every}", f"run.dir={tmp_path / str(every)}"]
        workers.run(2, train_recipe, recipe, overrides)
    once, twice = (stored(tmp_path / name, 4) for name in ("0", "2"))
    assert once and once == twice


# -- settings


@pytest.mark.parametrize("setting", ["window=16", "zscore=3.5"])
def test_settings_of_spikes_without_spikes_are_refused(tmp_path, setting):
    with pytest.raises(ConfigError, match=r'applies only to guard\.spikes = "report" or "skip"'):
        load_recipe(write_recipe(tmp_path), [f"guard.{setting}"])


def test_comparing_steps_needs_kernels_that_repeat(tmp_path):
    recipe, gpu = write_recipe(tmp_path, guard={"replay_every": 100}), torch.device("cuda")
    with pytest.raises(ConfigError, match=r"guard\.replay_every = 100 .*\n.*train\.deterministic = true"):
        require_repeatable(load_recipe(recipe), gpu)
    require_repeatable(load_recipe(recipe), torch.device("cpu"))
    require_repeatable(load_recipe(recipe, ["train.deterministic=true"]), gpu)
