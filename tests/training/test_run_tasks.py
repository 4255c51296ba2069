"""A run evaluates tasks in its own layout: the scores of one process, and nothing else changes."""

import json
import os
from math import lcm
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagap.checkpoint import load_model
from megagap.config import load_recipe
from megagap.errors import ConfigError, DataError
from megagap.inference import run_tasks
from megagap.inference.continuations import TextScorer
from megagap.inference.run_tasks import open_run_tasks, parts_of, score_rows
from megagap.inference.tasks import evaluate_task, read_tasks
from megagap.observe.metrics import read_metrics
from megagap.observe.run_directory import RunDirectory
from megagap.parallel.mesh import Mesh
from megagap.preprocess import preprocess
from megagap.preprocess.bpe import train_tokenizer
from megagap.process.rendezvous import Process
from megagap.tokenizer import load_tokenizer
from megagap.training import evaluate as evaluation
from megagap.training import trainer
from megagap.training.mesh import make_mesh
from tests.recipes import write_recipe
from tests.token_files import TEXTS
from tests.training_run import train_recipe
from tools.evaluate import main as evaluate

VOCABULARY = 301
"""No tp divides it; the tokenizer has fewer."""

QUIZ = [
    {"question": "The quick brown fox jumps over the", "choices": ["lazy dog.", "juge", "whisky"], "answer": 0},
    {"question": "Portez ce vieux", "choices": ["fox", "whisky au juge blond qui fume."], "answer": 1},
    {"question": "def f(x):\n ", "choices": ["   return [x ** 2 for _", "Déjà vu", "3.14", "isn't it"], "answer": 0},
    {"question": "", "choices": ["The quick", "qui fume"], "answer": 1},
    {"question": "fox " * 70, "choices": ["dog", "vu"], "answer": 0},
] * 3
PHRASES = [
    {"prompt": "The quick", "completion": "brown fox jumps"},
    {"prompt": "Portez ce vieux", "completion": "whisky"},
    {"prompt": "It's ", "completion": "3.14159"},
    {"prompt": "The quick brown", "completion": "juge"},
]


def write_lines(path: Path, lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path.name


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a recipe that learns four texts by heart and has two tasks of them. The longest context does not
    fit a sequence, which has all positions of the model."""
    folder = tmp_path_factory.mktemp("tasks")
    write_lines(folder / "text.jsonl", [{"text": text} for text in TEXTS * 20])
    train_tokenizer([folder / "text.jsonl"], folder / "bpe", 300)
    preprocess([folder / "text.jsonl"], str(folder / "held"), str(folder / "bpe"), append_eod=True)
    tasks = [write_lines(folder / "quiz.jsonl", QUIZ), write_lines(folder / "phrases.jsonl", PHRASES)]
    write_recipe(
        folder,
        model={"vocab_size": VOCABULARY, "max_position_embeddings": 64},
        data={"sources": [{"path": "held_text_document"}], "tokenizer": "bpe", "tasks": tasks},
        train={"steps": 60, "sequence_length": 64, "evaluate_tasks_every": 60},
        optim={"lr": 1e-2},
    )
    return folder


@pytest.fixture(scope="module")
def trained(made, workers):
    """The last step's numbers, of the run that one process made in ``made/run``."""
    return workers.run(1, train_recipe, made / "recipe.toml", [])[0][-1]


def in_layout(rank, ranks, recipe, overrides, checkpoint):
    """Scores of all texts by the ranks of a layout that have loaded ``checkpoint``, and what a run would record."""
    settings = load_recipe(recipe, overrides, ranks)
    mesh = make_mesh(settings, Process(rank, ranks, rank, ranks), torch.device("cpu"))
    run = RunDirectory(Path(settings.run.dir), is_writer=rank == 0)
    run.open()
    state, *_ = trainer.begin(settings, mesh, run, checkpoint, None)
    tasks = open_run_tasks(settings, mesh)
    scores = score_rows(state, tasks.rows)
    run.close()
    return [(score.nats, score.is_greedy, score.tokens) for score in scores], tasks.numbers(scores)


LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"parallel.tp": 2}),
    "tp2 without sequence parallelism": (2, {"parallel.tp": 2, "parallel.sequence_parallel": "false"}),
    "pp2 vpp2": (2, {"parallel.pp": 2, "parallel.vpp": 2}),
    "pp2 zb-v": (2, {"parallel.pp": 2, "parallel.schedule": "zb-v"}),
    "cp2": (2, {"parallel.cp": 2}),
    "dp2 zero 3": (2, {"optim.zero": 3}),
    "tp2 pp2": (4, {"parallel.tp": 2, "parallel.pp": 2}),
    "cp2 tp2 alltoall": (4, {"parallel.cp": 2, "parallel.tp": 2, "parallel.context_mode": "alltoall"}),
    "dp4 in 2 replicas, zero 3": (4, {"parallel.dp_replicate": 2, "optim.zero": 3}),
    "pp2 dp2 zero 2": (4, {"parallel.pp": 2, "optim.zero": 2}),
}


@pytest.fixture(scope="module")
def single(made, trained):
    """Scores of all texts by one process with the whole model, padded otherwise."""
    scorer = TextScorer(load_model(made / "run"), load_tokenizer(made / "bpe"), 500)
    tasks = read_tasks([made / "quiz.jsonl", made / "phrases.jsonl"])
    return [score for task in tasks for score in scorer.score(task.asked())]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_each_text_the_score_of_one_process(workers, tmp_path, made, trained, single, layout):
    ranks, settings = LAYOUTS[layout]
    overrides = [*(f"{name}={value}" for name, value in settings.items()), f"run.dir={tmp_path}"]
    checkpoint = made / "run/checkpoints/step_00000060"
    results = workers.run(ranks, in_layout, made / "recipe.toml", overrides, checkpoint)
    assert all(result == results[0] for result in results)
    scores, numbers = results[0]
    assert [nats for nats, _, _ in scores] == pytest.approx([score.nats for score in single], rel=2e-5)
    assert [rest for _, *rest in scores] == [[score.is_greedy, score.tokens] for score in single]
    assert numbers == pytest.approx({key: trained[key] for key in trained if key.startswith("task_")}, rel=1e-4)


def test_the_metrics_are_what_the_tool_says_of_the_checkpoint(capsys, made, trained):
    capsys.readouterr()
    evaluate([str(made / "run"), "--tasks", str(made / "quiz.jsonl"), str(made / "phrases.jsonl"), "--json"])
    told = json.loads(capsys.readouterr().out)["tasks"]
    found = {key: trained[key] for key in trained if key.startswith("task_")}
    assert found == {
        "task_accuracy/quiz": told["quiz"]["accuracy"]["value"],
        "task_accuracy_bytes/quiz": told["quiz"]["accuracy_bytes"]["value"],
        "task_bpb/quiz": pytest.approx(told["quiz"]["bits_per_byte"], rel=1e-4),
        "task_exact/phrases": told["phrases"]["exact"]["value"],
        "task_nats/phrases": pytest.approx(told["phrases"]["nats"]["value"], rel=1e-4),
        "task_bpb/phrases": pytest.approx(told["phrases"]["bits_per_byte"], rel=1e-4),
    }
    assert 0 < found["task_exact/phrases"] < 1 and 0 < found["task_accuracy/quiz"] < 1
    log = (made / "run/logs/rank_00000.log").read_text()
    assert "tasks at step 60 | accuracy/quiz 0." in log
    assert "contexts of 6 texts of data.tasks lose their beginning: train.sequence_length = 64\n" in log


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-pure"])
def test_in_bf16_they_are_those_of_the_checkpoint_in_bf16(workers, tmp_path, made, precision):
    settings = [f"train.precision={precision}", "train.steps=3", "parallel.tp=2", f"run.dir={tmp_path}"]
    last = workers.run(2, train_recipe, made / "recipe.toml", settings)[0][-1]
    scorer = TextScorer(load_model(tmp_path).to(torch.bfloat16), load_tokenizer(made / "bpe"), 500)
    (phrases,) = read_tasks([made / "phrases.jsonl"])
    assert last["task_nats/phrases"] == pytest.approx(evaluate_task(phrases, scorer)["nats"]["value"], rel=1e-2)


def test_contexts_that_have_fewer_positions_than_the_tool_gives_them_are_told(made, caplog):
    settings = load_recipe(made / "recipe.toml", ["train.sequence_length=32"])
    assert max(row.length for row in open_run_tasks(settings, Mesh.single()).rows) == 32
    assert "train.sequence_length = 32; megagap evaluate has 64 positions, and may score them otherwise" in caplog.text


def without_times(metrics):
    times = ("seconds", "tokens_per_second", "tflops_per_device", "memory_bytes", "task_")
    return [{key: m[key] for key in m if not any(part in key for part in times)} for m in metrics]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(run).named_parameters())


@pytest.mark.parametrize("layout", [["optim.zero=3"], ["parallel.pp=2"]], ids=["dp2 zero 3", "pp2"])
def test_they_change_nothing_of_training(workers, tmp_path, made, layout):
    common = [*layout, "train.steps=5", "train.precision=bf16-mixed"]
    runs = []
    for every in (0, 2):
        settings = [*common, f"train.evaluate_tasks_every={every}", f"run.dir={tmp_path / str(every)}"]
        runs.append(workers.run(2, train_recipe, made / "recipe.toml", settings)[0])
    assert without_times(runs[0]) == without_times(runs[1])
    without, with_tasks = weights_of(tmp_path / "0"), weights_of(tmp_path / "2")
    assert all(torch.equal(without[name], with_tasks[name]) for name in without)
    assert [m["step"] for m in runs[1] if "task_accuracy/quiz" in m] == [2, 4, 5]
    log = (tmp_path / "0/logs/rank_00000.log").read_text()
    assert "data.tasks is given, but train.evaluate_tasks_every = 0: they are never evaluated" in log


def tasks_of(metrics):
    return {
        m["step"]: {key: m[key] for key in m if key.startswith("task_")} for m in metrics if "task_exact/phrases" in m
    }


def test_a_resumed_run_records_each_evaluation_once_and_as_an_undisturbed_one(workers, tmp_path, made):
    recipe, settings = made / "recipe.toml", ["train.steps=6", "train.evaluate_tasks_every=2", "checkpoint.every=3"]
    first = ["train.evaluate_first=true"]
    whole = workers.run(2, train_recipe, recipe, [*settings, *first, f"run.dir={tmp_path / 'whole'}"])[0]
    assert list(tasks_of(whole)) == [0, 2, 4, 6] and whole[0].keys() >= {"consumed_tokens", "task_nats/phrases"}
    settings += [*first, f"run.dir={tmp_path / 'run'}"]
    workers.run(2, train_recipe, recipe, [*settings, "run.stop_after=2"])  # evaluated, and then stopped
    workers.run(2, train_recipe, recipe, [*settings, "run.stop_after=3"])  # to step 5
    # Killed after the evaluation of step 4, before its checkpoint: it is made again.
    (tmp_path / "run/checkpoints/step_00000005").rename(tmp_path / "lost")
    resumed = workers.run(2, train_recipe, recipe, settings)[0]
    assert [m["step"] for m in resumed] == [0, 1, 2, 3, 4, 5, 6]
    assert tasks_of(resumed) == tasks_of(whole)
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert [log.count(f"tasks at step {step} |") for step in (0, 2, 4, 6)] == [1, 1, 2, 1]


def test_tensorboard_gets_every_evaluation_whatever_its_interval(workers, tmp_path, made):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = ["train.steps=5", "train.evaluate_tasks_every=2", "train.evaluate_first=true", f"run.dir={tmp_path}"]
    tensorboard = ["run.tensorboard=true", "run.tensorboard_every=100"]
    (metrics,) = workers.run(1, train_recipe, made / "recipe.toml", settings + tensorboard)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("task_nats/phrases")}
    assert shown == pytest.approx({step: numbers["task_nats/phrases"] for step, numbers in tasks_of(metrics).items()})
    assert list(shown) == [0, 2, 4, 5]


def stopped_in_tasks(rank, ranks, recipe, overrides):
    """The last rank is asked to stop once the scoring of the first tasks has begun."""
    compute, poll, begun = evaluation.ForwardPasses.compute, trainer.Requests.poll, []

    def computing(self, work, inputs):
        compute(self, work, inputs)
        begun.append(isinstance(work, run_tasks.ScoringStages))

    def stopping(self):
        if any(begun) and rank == ranks - 1:
            self.reason = "SIGTERM"
        return poll(self)

    with (
        patch.object(evaluation.ForwardPasses, "compute", computing),
        patch.object(trainer.Requests, "poll", stopping),
    ):
        train_recipe(rank, ranks, recipe, overrides)
    return sum(begun)


def test_an_evaluation_that_a_stop_cuts_short_is_made_when_the_run_goes_on(workers, tmp_path, made):
    recipe = made / "recipe.toml"
    common = ["train.steps=4", "train.evaluate_every=2", "train.evaluate_tasks_every=2", "train.evaluate_samples=3"]
    common.append("data.split=80,20,0")
    whole = workers.run(2, train_recipe, recipe, [*common, f"run.dir={tmp_path / 'whole'}"])[0]
    settings = [*common, f"run.dir={tmp_path / 'run'}"]
    assert workers.run(2, stopped_in_tasks, recipe, settings) == [1, 1]
    before = read_metrics(tmp_path / "run/metrics.jsonl")
    assert before[-1]["step"] == 2 and "validation_loss" in before[-1] and not tasks_of(before)
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert "the evaluation at step 2 was stopped: it has no scores of tasks" in log
    resumed = workers.run(2, train_recipe, recipe, settings)[0]
    assert without_times(resumed) == without_times(whole) and tasks_of(resumed) == tasks_of(whole)


@given(
    st.lists(st.integers(1, 96), max_size=60), st.sampled_from([1, 4, 6]), st.integers(1, 300), st.integers(1, 8),
    st.integers(1, 5),
)  # fmt: skip
def test_every_row_is_in_one_part_of_one_shape_on_all_ranks(lengths, unit, batch_tokens, most, ranks):
    parts = parts_of(lengths, 96, unit, batch_tokens, most, ranks)
    assert sorted(i for part in parts for i in part.rows) == list(range(len(lengths)))
    for part in parts:
        assert part.length % unit == 0 and part.microbatches <= most
        assert part.batch == 1 or part.batch * part.length <= batch_tokens
        assert [i for rank in range(ranks) for i in part.of_rank(rank)] == list(part.rows)
        assert all(len(part.of_rank(rank)) <= part.batch * part.microbatches for rank in range(ranks))
        assert all(lengths[i] <= part.length <= 96 for i in part.rows)
        assert part.length <= lcm(unit, 32) or all(2 * lengths[i] > part.length for i in part.rows)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def opened(made, tmp_path):
    """Opens the tasks of a recipe whose ``bad.jsonl`` has these lines."""

    def opened(content: str | bytes, *overrides: str):
        path = tmp_path / "bad.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        settings = load_recipe(made / "recipe.toml", [f"data.tasks=['{path}']", *overrides])
        return open_run_tasks(settings, Mesh.single())

    return opened


GOOD = '{"prompt": "The", "completion": "fox"}\n'
BAD = {
    "not JSON": ("{\n", "line 2: not valid JSON"),
    "a field": ('{"prompt": "a"}\n', "line 2: has neither 'choices' nor 'completion'"),
    "bytes": (b'{"prompt": "\xff", "completion": "b"}\n', "line 2: not valid UTF-8 at byte 13"),
    "long": (json.dumps({"prompt": "a", "completion": "fox " * 99}) + "\n", "more than train.sequence_length = 64"),
    "a kind": ('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n', "line 2: is multiple choice"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_refused_with_its_file_and_number(opened, kind):
    line, said = BAD[kind]
    with pytest.raises(DataError) as error:
        opened(GOOD.encode() + (line if isinstance(line, bytes) else line.encode()))
    assert "bad.jsonl, line 2: " in str(error.value) and said in str(error.value)


def test_all_faults_of_the_files_are_told_at_once_and_of_many_the_first(opened, made, tmp_path):
    with pytest.raises(DataError) as error:
        opened(GOOD + "{\n" + GOOD + '{"prompt": "a"}\n' + "[]\n" * 30)
    told = str(error.value).splitlines()
    assert "32 faults in task files" in told[0] and "line 2: not valid" in told[1] and "line 4: has" in told[2]
    assert told[-1].strip() == "and 12 more" and len(told) == 22


def test_what_is_no_file_is_refused_and_all_of_it_at_once(made, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    names = ("pipe", "folder", "pointer", "none")
    paths = [str(tmp_path / name) for name in names]
    with pytest.raises(DataError) as error:
        open_run_tasks(load_recipe(made / "recipe.toml", [f"data.tasks={paths}"]), Mesh.single())
    assert all(path in str(error.value) for path in paths) and "Git LFS pointer" in str(error.value)


def fail_to_open(rank, ranks, recipe, overrides):
    settings = load_recipe(recipe, overrides, ranks)
    try:
        open_run_tasks(settings, make_mesh(settings, Process(rank, ranks, rank, ranks), torch.device("cpu")))
    except DataError as error:
        return str(error)


def test_all_ranks_end_with_what_the_first_finds(workers, made, tmp_path):
    (told, again) = workers.run(2, fail_to_open, made / "recipe.toml", [f"data.tasks=['{tmp_path}/none.jsonl']"])
    assert told == again and "none.jsonl" in told and "No such file" in told


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.tasks=[]"], "train.evaluate_tasks_every = 60 needs files of JSON lines: set data.tasks"),
        (["data.tokenizer="], "needs the tokenizer of the sources, which encodes texts: set data.tokenizer"),
        (["model.headless=true", "model.tie_word_embeddings=true"], "cannot be evaluated with model.headless"),
        (["data.tasks=quiz.jsonl"], "data.tasks"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(made, overrides, said):
    with pytest.raises(ConfigError) as error:
        load_recipe(made / "recipe.toml", overrides)
    assert said in " ".join(str(error.value).split())
