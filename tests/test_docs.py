"""The commands of README and docs work, as they stand there, and what the pages say of the settings is true."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megagap.commands import call
from megagap.config.settings import PLANNED
from megagap.observe.metrics import read_metrics
from megagap.parallel import schedule
from megagap.parallel.program import actions_of, bubble_fraction, peak_live_activations, timeline
from megagap.terminal.programs import CalledAs
from tests.warm_start import python

ROOT = Path(__file__).parents[1]
README, RUNNING = ROOT / "README.md", ROOT / "docs/running.md"
TESTED = re.compile(r"<!-- tested: (.+?) -->\n```bash\n(.*?)```", re.DOTALL)


def blocks(page: Path) -> dict[str, str]:
    """The shell blocks behind ``<!-- tested: NAME -->``, by name, in order."""
    return dict(TESTED.findall(page.read_text(encoding="utf-8")))


def run(script: str, folder: Path) -> str:
    folders = (Path(python()).parent, Path(sys.executable).parent, os.environ["PATH"])
    environment = os.environ | {"PATH": ":".join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A folder in which the README's main job has been done, with a quarter of the text and of a sequence's length."""
    folder = tmp_path_factory.mktemp("example")
    for name in ("examples", "tools"):
        shutil.copytree(ROOT / name, folder / name)
    recipe = folder / "examples/recipes/code.toml"
    recipe.write_text(recipe.read_text().replace("sequence_length = 128", "sequence_length = 32"))
    run(blocks(README)["the main job"].replace("--megabytes 2", "--megabytes 0.5"), folder)
    return folder


@pytest.mark.slow
def test_the_main_job_by_hand(example):
    results = ("run/metrics.jsonl", "loss.png", "hf/config.json", "hf/model.safetensors", "hf/tokenizer.json")
    for result in results:
        assert (example / "runs/example" / result).stat().st_size > 0, result


@pytest.mark.slow
def test_the_commands_beside_the_main_job(example):
    assert "load_mode" in run(blocks(README)["other jobs"], example)
    assert "fits" in run(blocks(README)["memory"], example)
    assert "holds  coverage" in run(blocks(README)["dry run"], example)


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on_as_the_page_on_running_says(example):
    stopped = run(blocks(RUNNING)["stop and resume"], example)
    assert '"preempted"' in stopped and status(example / "runs/example/stopped") == ("finished", 40)


@pytest.mark.long
def test_what_the_page_on_running_does_with_a_run_besides(example):
    """Its commands in order, and what it says of their results."""
    runs = example / "runs/example"
    parts = blocks(RUNNING)
    first, then = ["stop and resume", "change the layout", "cooldown", "fine-tune"], ["loss spike", "replay", "look"]
    assert list(parts) == first + then

    run(parts["change the layout"], example)
    assert status(runs / "layouts") == ("finished", 40)
    assert "parallel.pp was 1, is 2" in (runs / "layouts/logs/rank_00000.log").read_text()

    run(parts["cooldown"], example)
    rates = {record["step"]: record["lr"] for record in read_metrics(runs / "cooldown/metrics.jsonl")}
    assert min(rates) == 21 and rates[21] < 3e-3 and rates[30] < rates[29] < rates[22]
    assert status(runs / "constant") == ("finished", 60)

    run(parts["fine-tune"].replace("--train.steps 10", "--train.steps 10 --train.sequence_length 32"), example)
    assert status(runs / "finetuned") == ("finished", 10)

    run(parts["loss spike"], example)
    samples = json.loads(run(f"{SPIKE} --step 25 --json", example))
    assert [sample["sample"] for sample in samples] == list(range(384, 400))
    without = json.loads(run(f"{SPIKE} --step 25 --json --train.skip_samples '[\"384:400\"]'", example))
    assert [sample["sample"] for sample in without] == list(range(400, 416))
    assert status(runs / "without_spike") == ("finished", 40)
    assert '"equal": true' in run(parts["replay"], example)

    commands = [line for line in parts["look"].splitlines() if "not run by the test" not in line]
    run("\n".join(commands), example)
    assert (runs / "compare.png").stat().st_size > 0


@pytest.mark.slow
def test_the_page_on_evaluation(example):
    assert '"bits_per_byte"' in run(blocks(ROOT / "docs/evaluation.md")["evaluation"], example)


@pytest.mark.long
@pytest.mark.parametrize(("page", "said"), [("memory", '"fits"'), ("trace", '"step_seconds"')])
def test_the_pages_on_memory_and_prediction(example, page, said):
    """The README has commands of both."""
    assert said in run(blocks(ROOT / f"docs/{page}.md")[page], example)


@pytest.mark.long
def test_the_page_on_mixtures(example):
    """On the example's data: sequences of 32,768 tokens are of 64, and step 1,200 is step 12."""
    recipe = (example / "examples/recipes/code.toml").read_text()
    (example / "recipe.toml").write_text(recipe.replace("../../runs", "runs"))
    parts = blocks(ROOT / "docs/mixtures.md")
    run(parts["plan"].replace("--step 1200", "--step 12"), example)
    assert (example / "plan.png").stat().st_size > 0
    shutil.copytree(example / "runs/example/run", example / "runs/base")
    run(parts["longer"].replace("32768", "64"), example)
    assert status(example / "runs/long") == ("finished", 40)


@pytest.mark.slow
def test_the_page_on_token_files(example, tmp_path):
    """In a folder that has what the commands name; with 1,500 documents, and a smaller vocabulary."""
    texts = [f"Veuillez accepter les cookies, s'il vous plaît : document {i}." for i in range(1500)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for folder in ("crawl", "books", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "crawl/a.jsonl").write_text(lines)
    (tmp_path / "data/a.jsonl").write_text(lines)
    parquet.write_table(pyarrow.table({"text": texts[:3]}), tmp_path / "books/a.parquet")
    shutil.copy(example / "runs/example/tokenizer/tokenizer.json", tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    parts = blocks(ROOT / "docs/data.md")
    assert "verified" in run(parts["preprocess"], tmp_path)
    assert "in 1,503 of 1,503 documents" in run(parts["inspect"], tmp_path)
    run(parts["tokenizer"].replace("32768", "300"), tmp_path)
    assert (tmp_path / "tokenizer/tokenizer.json").exists()


SCHEDULES = ROOT / "docs/schedules.md"
DRAWN = re.compile(r"<!-- drawn: (.+?) -->\n```text\n(.*?)```", re.DOTALL)


def test_the_pictures_on_the_page_on_schedules_are_those_that_are_drawn(capsys):
    drawn = DRAWN.findall(SCHEDULES.read_text(encoding="utf-8"))
    assert {arguments.split()[0] for arguments, _ in drawn} == set(schedule.SCHEDULES)
    for arguments, picture in drawn:
        call("draw-schedule", CalledAs.TOOL, arguments.split())
        assert capsys.readouterr().out == picture, arguments


def test_bubbles_and_activations_on_the_page_on_schedules_are_right():
    rows = re.findall(
        r"^\| `([\w-]+)`.*?\| (\d+|any) \|.*?\| ([\d.]+) % \| ([\d.]+) \|", SCHEDULES.read_text(), re.MULTILINE
    )
    assert {name for name, *_ in rows} == set(schedule.SCHEDULES)
    for name, chunks, bubble, live in rows:
        kind, count = schedule.SCHEDULES[name], 1 if chunks == "any" else int(chunks)
        placement = kind.place([1] * 8 * count, count)
        actions = actions_of(kind, placement, 32)
        assert f"{100 * bubble_fraction(timeline(actions, placement)):.1f}" == bubble, name
        assert max(map(peak_live_activations, actions)) / count == float(live), name


@pytest.mark.slow
def test_the_commands_of_the_page_on_schedules(example):
    assert '"bubble_fraction": 0.067' in run(blocks(SCHEDULES)["schedules"], example)
    assert (example / "interleaved.png").stat().st_size > 0


SPIKE = "python tools/inspect_data.py examples/recipes/code.toml"


def status(folder: Path) -> tuple[str, int]:
    record = json.loads((folder / "status.json").read_text())
    return record["state"], record["step"]


def test_the_training_path_can_be_read_in_an_afternoon():
    assert 1500 < int(run(blocks(README)["line count"], ROOT)) < 12_400


def test_what_is_planned_is_said_in_the_readme():
    """Each planned setting stands in the column of what is planned, and nothing that exists does."""
    rows = [line.split("|")[1:-1] for line in README.read_text(encoding="utf-8").splitlines() if line.count("|") == 5]
    features = {row[0].strip(): row[1:] for row in rows}
    planned = {name for row in features.values() for name in SETTING.findall(row[1])}
    assert planned == {f"{section}.{key}" for section, keys in PLANNED.items() for key in keys}


SETTING = re.compile(r"`([a-z]+\.[a-z_]+)`")


def test_links_between_the_pages_lead_somewhere():
    missing = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(ROOT)}: {target}")
    assert not missing


def test_anchors_of_the_pages_exist():
    missing = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            where = page if not target else page.parent / target
            if "://" not in target and where.suffix == ".md" and anchor not in anchors(where):
                missing.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
    assert not missing


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
