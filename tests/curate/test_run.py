"""A whole curation, from its settings file to token files and a report."""

import hashlib
import json
import os
import random
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import pytest

pytest.importorskip("datatrove", reason="pip install megagap[curate]")
pytest.importorskip("ahocorasick", reason="pip install megagap[curate]")
pytest.importorskip("tldextract", reason="pip install megagap[curate]")

from megagap.curate.counts import documents
from megagap.curate.report import write_report
from megagap.curate.run import Executor, input_files, run_curation
from megagap.curate.settings import load_curation
from megagap.curate.slurm_queue import record_jobs, require_ended
from megagap.data.indexed import IndexedDataset
from megagap.errors import ConfigError, DataError
from megagap.files import Lock
from tests.token_files import FRENCH

ITEM = "In story nine the lantern keeper counts forty cedar planks behind the old granary while it rains."
SECRET = "jean.dupont@laposte.net"

SETTINGS = """
tasks = 2
[input]
folder = "corpus"
[output]
folder = "out"
tokenizer = "TOKENIZER"
[urls]
lists = "lists"
[language]
[quality.en.gopher]
[quality.fr.gopher]
min_stop_words = 2
stop_words = ["le", "la", "de", "et", "que"]
[deduplicate]
[mask]
[decontaminate]
benchmarks = ["benchmarks/*.jsonl"]
ngrams = 12
"""


def corpus() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Python's own topics of help, sentences of La Fontaine in varied order, and what is to be found among them."""
    draw = random.Random(0)
    english = [text for text in topics.topics.values() if 400 < len(text) < 4000][:16]
    sentences = FRENCH.replace("\n", " ").split(". ")
    french = [". ".join(draw.sample(sentences, len(sentences))) + f". Fable {i}." for i in range(10)]
    yield "english", [{"text": text} for text in english]
    yield "french", [{"text": " ".join(draw.sample(text.split(), 120)) + " de la et le"} for text in french]
    copy = english[0].split()
    copy[5] = "another"
    yield (
        "planted",
        [
            {"text": " ".join(copy), "id": "copy"},
            {"text": f"{english[1][:200]} {ITEM} {' '.join(reversed(english[1].split()))}", "id": "contaminated"},
            {"text": f"{' '.join(reversed(english[2].split()))} {SECRET} the and of to", "id": "secret"},
            {"text": " ".join(reversed(english[3].split())), "id": "blocked", "url": "https://www.blocked.org/a"},
            {"text": "x = 1; " * 200, "id": "code"},
        ],
    )


@pytest.fixture
def recipe(tmp_path: Path, tokenizer_folder: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    for name, lines in corpus():
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"corpus/{name}.jsonl").write_text(content)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/domains").write_text("blocked.org\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/stories.jsonl").write_text(json.dumps({"question": ITEM}) + "\n")
    path = tmp_path / "curation.toml"
    path.write_text(SETTINGS.replace("TOKENIZER", str(tokenizer_folder)))
    return path


def run(recipe: Path, output: str = "out", **executor: object) -> Path:
    settings = load_curation(recipe)
    folder = recipe.parent / output
    settings = settings.model_copy(update={"output": settings.output.model_copy(update={"folder": str(folder)})})
    run_curation(settings, Executor(**executor))  # type: ignore[arg-type]
    return folder


def fingerprint(output: Path) -> dict[str, object]:
    """All that a curation yields, but for times."""
    files = {path.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in output.glob("*_text_document.*")}
    del files["en_text_document.json"], files["fr_text_document.json"]  # of versions and times
    texts = [(document["id"], document["text"]) for document in documents(output / "curated")]
    counts = json.loads((output / "counts.json").read_text())["stages"]
    kept = [(stage["stage"], stage["kept"], stage["dropped"], stage["reasons"]) for stage in counts]
    return {"files": files, "texts": texts, "counts": kept}


@pytest.mark.slow
def test_a_curation_finds_what_it_should_and_two_workers_give_the_same(recipe: Path) -> None:
    output = run(recipe)
    ids = {stage: {d["id"] for d in documents(output / "dropped" / stage)} for stage in ("urls", "language")}
    assert ids["urls"] == {"blocked"} and "code" in ids["language"]
    # One of the two that are alike stays, whichever.
    (duplicate,) = documents(output / "dropped/deduplicate")
    assert duplicate["id"] in ("copy", "english.jsonl/0")
    assert [document["id"] for document in documents(output / "dropped/decontaminate")] == ["contaminated"]
    texts = {document["id"]: document["text"] for document in documents(output / "curated")}
    assert SECRET not in texts["secret"] and "email@example.com" in texts["secret"]
    assert len(IndexedDataset(output / "fr_text_document")) == len(list(documents(output / "curated/fr"))) == 10

    times = json.loads((output / "counts.json").read_text())["cpu_seconds"]
    assert times.keys() >= {"filter", "signatures", "select", "tokens-fr"} and times["filter"] > 0

    page = (output / "report.html").read_text()
    assert "decontaminate" in page and "contaminated" in page and ITEM[3:40].lower() in page.lower()
    assert "src=" not in page and "http-equiv" not in page and "<script" not in page and "<link" not in page

    assert fingerprint(run(recipe, "again", workers=2)) == fingerprint(output)

    # Another call finds everything complete; other settings or input are refused instead of mixed.
    before = (output / "en_text_document.bin").stat().st_mtime_ns
    run(recipe)
    assert (output / "en_text_document.bin").stat().st_mtime_ns == before
    assert write_report(output).read_text() == page
    recipe.write_text(recipe.read_text().replace("ngrams = 12", "ngrams = 11"))
    with pytest.raises(ConfigError, match=r"was begun with other settings(.|\n)*another output\.folder"):
        run(recipe)
    recipe.write_text(recipe.read_text().replace("ngrams = 11", "ngrams = 12"))
    (recipe.parent / "corpus/more.jsonl").write_text('{"text": "more"}\n')
    with pytest.raises(ConfigError, match="was begun with other input files"):
        run(recipe)
    (recipe.parent / "corpus/more.jsonl").unlink()
    for name in ("benchmarks/stories.jsonl", "lists/domains"):
        path = recipe.parent / name
        path.write_text(path.read_text() + "\n")
        with pytest.raises(ConfigError, match="was begun with other benchmarks, lists or models"):
            run(recipe)


@pytest.mark.long
def test_ray_gives_the_same(recipe: Path) -> None:
    pytest.importorskip("ray", reason="pip install ray")
    assert fingerprint(run(recipe, "ray", kind="ray", workers=2)) == fingerprint(run(recipe, "local"))


SBATCH = """#!{python}
# A stand-in for Slurm's sbatch: runs a job array at once, one task after the other. Jobs come in the order of their
# dependencies, which it checks.
import os, re, subprocess, sys
from pathlib import Path

folder = Path(__file__).parent
done = sorted(folder.glob("job-*"))
dependency = [a for a in sys.argv if a.startswith("--dependency=")]
for job in re.findall(r":(\\d+)", "".join(dependency)):
    assert (folder / f"job-{{int(job):04}}").exists(), dependency
script = Path(sys.argv[-1])
match = re.search(r"--array=0-(\\d+)", script.read_text())
for task in range(int(match[1]) + 1 if match else 1):
    environment = os.environ | dict(
        SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST="here", SLURM_JOB_ID="1", RUN_OFFSET="0"
    )
    subprocess.run(["bash", str(script)], env=environment, check=True, stdout=sys.stderr)
number = len(done) + 1
(folder / f"job-{{number:04}}").touch()
print("Submitted batch job", number)
"""


def script(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.long
def test_slurm_jobs_give_the_same(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = recipe.parent / "bin"
    programs.mkdir()
    script(programs / "sbatch", SBATCH.format(python=sys.executable))
    script(programs / "srun", '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n')
    script(programs / "scontrol", "#!/bin/bash\necho here\n")
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    options = {"time": "1:00:00", "partition": "cpu"}
    output = run(recipe, "slurm", kind="slurm", workers=2, options=options)
    assert fingerprint(output) == fingerprint(run(recipe, "local"))
    odd = [str(number) for number in range(1, 19, 2)]  # the others add up logs
    assert json.loads((output / "slurm_jobs.json").read_text()) == odd


def test_jobs_that_are_in_the_queue_are_not_submitted_again(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor run by another executor, which would write the same files; the fourth is not taken."""
    programs = recipe.parent / "bin"
    programs.mkdir()
    count = f"n=$(($(cat {programs}/jobs 2>/dev/null) + 1)); ((n == 4)) && exit 1; echo $n | tee {programs}/jobs"
    script(programs / "sbatch", f"#!/bin/bash\n{count}\n")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    slurm = dict(kind="slurm", options={"time": "1:00:00", "partition": "cpu"})
    with pytest.raises(ConfigError, match="sbatch did not take the jobs"):
        run(recipe, **slurm)
    script(programs / "squeue", "#!/bin/bash\nprintf '%s\\n' 7 3 3\n")
    for executor in (slurm, {}):
        with pytest.raises(ConfigError, match=r"the jobs 1, 3 of this.*; 3 is still in its queue\n.*scancel 3\."):
            run(recipe, **executor)
    script(programs / "squeue", "#!/bin/bash\necho no controller >&2; exit 1\n")
    with pytest.raises(ConfigError, match=r"squeue does not say whether they have ended: no controller\n.*remove .*"):
        run(recipe)
    script(programs / "squeue", "#!/bin/bash\necho 7\n")
    require_ended(recipe.parent / "out")


def test_jobs_that_nobody_can_ask_for_are_taken_for_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    require_ended(tmp_path)
    record_jobs(tmp_path, ["11", "12"])
    with pytest.raises(ConfigError, match=r"jobs 11, 12 .*no squeue here to ask for them\n  once they have ended"):
        require_ended(tmp_path)


def test_slurm_without_sbatch_or_a_partition_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(recipe.parent))
    with pytest.raises(ConfigError, match="needs sbatch, which is not on PATH"):
        run(recipe, kind="slurm")
    script(recipe.parent / "sbatch", "#!/bin/bash\n")
    with pytest.raises(ConfigError, match="needs --option time="):
        run(recipe, kind="slurm")


@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_an_option_that_the_executor_does_not_take_is_refused(
    recipe: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(recipe.parent / "sbatch", "#!/bin/bash\n")
    monkeypatch.setenv("PATH", str(recipe.parent))
    with pytest.raises(ConfigError, match=r"--option partitions is unknown\n.*of datatrove has .*randomize_start"):
        run(recipe, kind=kind, options=dict(partitions="cpu", time="1:00:00", partition="cpu"))


def test_contaminated_validation_stops_a_curation_before_it_starts(recipe: Path) -> None:
    (recipe.parent / "validation.jsonl").write_text(json.dumps({"text": f"Once. {ITEM}"}) + "\n")
    recipe.write_text(recipe.read_text() + 'validation = ["validation.jsonl"]\n')
    with pytest.raises(DataError, match=r"validation data is contaminated(.|\n)*validation\.jsonl, item 1: .* stories"):
        run(recipe)
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('folder = "corpus"', 'folder = "none"', r"input\.folder: there is no folder"),
        ('folder = "corpus"', 'folder = "corpus"\npattern = "*.parquet"', r"no file in .* matches \*\.parquet"),
        ('folder = "corpus"', 'folder = "corpus"\ntext_key = "body"', 'none of its first .* with a "body"'),
        ("benchmarks/", "nothing/", "no benchmark file matches"),
        ('lists = "lists"', 'lists = "corpus"', r"urls\.lists: the folder .* has none"),
        ("[mask]", '[mask]\n[classifier]\nmodel = "corpus"', "is no quality classifier"),
        ("[language]", '[language]\nmodel = "lid.bin"', r"there is no file .*lid\.bin"),
        (
            "ngrams = 12",
            "ngrams = 40",
            r"stories\.jsonl keeps nothing out: its 1 item: fewer than 40 words each",
        ),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_written(
    recipe: Path, old: str, new: str, message: str
) -> None:
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        run(recipe)
    assert not (recipe.parent / "out").exists()


def test_files_behind_links_are_read_and_what_is_left_out_is_told(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = recipe.parent / "corpus"
    (corpus / "french.jsonl").rename(recipe.parent / "benchmarks/moved.jsonl")
    (corpus / "linked").symlink_to(recipe.parent / "benchmarks")
    (corpus / "copy.jsonl").symlink_to(corpus / "english.jsonl")
    (corpus / "more.json").write_text(json.dumps({"text": "A text."}) + "\n")
    (corpus / "table.csv").write_text("a,b\n1,2\n")
    (recipe.parent / "benchmarks/stories.jsonl").rename(recipe.parent / "stories.jsonl")
    names = [str(path.relative_to(corpus)) for path in input_files(load_curation(recipe))]
    assert names == ["copy.jsonl", "linked/moved.jsonl", "planted.jsonl"]
    assert "english.jsonl: the same file as" in caplog.text and "table.csv: " in caplog.text
    assert '1 file of text is left out: input.pattern = "*.jsonl*" does not match' in caplog.text


def test_all_faults_of_a_settings_file_are_told_at_once(recipe: Path) -> None:
    recipe.write_text(
        recipe.read_text().replace("tasks = 2", 'tasks = 0\nwords = "nltk"').replace("[mask]", '[mask]\nkind = "ip"')
    )
    with pytest.raises(ConfigError) as error:
        load_curation(recipe)
    message = str(error.value)
    assert "3 faults" in message and "tasks = 0" in message and "words" in message
    assert "mask.kind" in message and "is unknown; there are kinds" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[quality.de.gopher]", r"quality\.de +is a language that language\.keep"),
        ("[deduplicate", "is not valid TOML"),
        ('[classifier]\nmodel = "a\\u0000b"', r"classifier\.model.* has a NUL character"),
        ("[quality.en.c4]", r"quality\.en\.c4"),
    ],
)
def test_a_settings_file_that_makes_no_sense_is_refused(recipe: Path, change: str, message: str) -> None:
    recipe.write_text(recipe.read_text() + change + "\n")
    with pytest.raises(ConfigError, match=message):
        load_curation(recipe)


def test_n_grams_that_would_take_for_ever_are_refused(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("ngrams = 12", "ngrams = 100_000"))
    with pytest.raises(ConfigError, match=r"decontaminate\.ngrams = 100000 +input should be less than or equal to 100"):
        load_curation(recipe)


def test_a_tokenizer_whose_kind_is_forced_is_found_beside_the_settings(recipe: Path) -> None:
    recipe.write_text(re.sub(r'tokenizer = ".*"', 'tokenizer = "hf:tokenizer"', recipe.read_text()))
    assert load_curation(recipe).output.tokenizer == f"hf:{recipe.parent / 'tokenizer'}"


def test_an_output_folder_has_one_writer_and_is_not_mixed_with_other_files(recipe: Path) -> None:
    output = recipe.parent / "out"
    output.mkdir()
    lock = Lock(output / ".lock")
    with pytest.raises(DataError, match="is being written by process"):
        run(recipe)
    lock.release()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"is not empty \(thesis\.tex"):
        run(recipe)


def test_a_curation_that_drops_everything_says_which_stage_dropped_it(recipe: Path) -> None:
    recipe.write_text(
        recipe.read_text().replace(
            "[quality.fr.gopher]", "min_doc_words = 9000\n[quality.fr.gopher]\nmin_doc_words = 9000"
        )
    )
    with pytest.raises(DataError, match=r"no document is left after the stage filter; dropped: .*gopher \d+"):
        run(recipe)
