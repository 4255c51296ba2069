"""``megagap curate``: from labels to a classifier, scores and their histograms, and its answers to bad input."""

import json
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="pip install megagap[curate]")

from megagap.commands import call
from megagap.curate.quality.linear import LinearModel
from megagap.curate.quality.model import QualityModel, Record, save_quality_model
from megagap.errors import ConfigError, DataError
from megagap.terminal.programs import CalledAs
from tests.token_files import FRENCH


def curate(*arguments: object) -> None:
    call("curate", CalledAs.COMMAND, [str(argument) for argument in arguments])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    text = FRENCH.replace("\n", " ")
    lines = [json.dumps({"text": f"{text} Fable {i}. {text}", "source": f"fable {i}"}) for i in range(80)]
    (tmp_path / "fables.jsonl").write_text("\n".join(lines))
    return tmp_path / "fables.jsonl"


def test_labels_train_a_classifier_whose_scores_are_drawn(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, model, scores, page = (tmp_path / name for name in ("labels.jsonl", "model", "scores.jsonl", "scores.html"))
    curate("example-labels", corpus, "--output", labels, "--per-document", 3)
    curate("train-quality", labels, "--kind", "linear", "--epochs", 3, "--output", model)
    curate("calibrate", model, labels)
    curate("score", model, corpus, "--output", scores)
    printed = capsys.readouterr().out
    assert "240 labelled texts" in printed and printed.count("overall     accuracy") == 2
    assert "80 documents" in printed and "per second of a core" in printed
    assert len(scores.read_text().splitlines()) == 80
    curate("histogram", scores, "--output", page)
    assert "<svg" in page.read_text() and "fables" in page.read_text() and "<script" not in page.read_text()
    with pytest.raises(DataError, match="is not empty"):
        curate("train-quality", labels, "--kind", "linear", "--output", model)
    with pytest.raises(ConfigError, match="--head quality is unknown"):
        curate("histogram", scores, "--head", "quality", "--output", page)
    with pytest.raises(ConfigError, match="--encoder is for --kind encoder"):
        curate("train-quality", labels, "--kind", "linear", "--encoder", model, "--output", tmp_path / "other")
    before = corpus.read_bytes()
    for command in (["score", model, corpus], ["example-labels", corpus]):
        with pytest.raises(DataError, match="is also an input, and would be replaced"):
            curate(*command, "--output", corpus)
    assert corpus.read_bytes() == before
    with pytest.raises(ConfigError, match="at least 16"):
        curate("train-quality", labels, "--max-length", 2, "--output", tmp_path / "other")


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"}',
        '{"metadata": 5}',
        '{"metadata": {"quality_scores": 5}}',
        '{"metadata": {"quality_scores": {"style": 1}}}',
        '{"metadata": {"quality_scores": {"overall": "high"}}}',
        '{"metadata": {"quality_scores": {"overall": -7}}}',
    ],
)
def test_what_is_no_score_is_refused_by_its_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "scores.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"line 1 is no object with .* overall from 0 to 2"):
        curate("histogram", tmp_path / "scores.jsonl", "--output", tmp_path / "page.html")


@pytest.mark.parametrize("command", [["score", "MODEL"], ["example-labels"]])
def test_a_text_that_is_none_is_refused_by_its_line(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    model = QualityModel(Record(kind="linear", buckets=64, width=4), LinearModel(64, 4))
    save_quality_model(model, tmp_path / "MODEL")
    folders = [str(tmp_path / part) if part == "MODEL" else part for part in command]
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is no object with a \"text\""):
        curate(*folders, tmp_path / "a.jsonl", "--output", tmp_path / "out.jsonl")


def test_check_names_the_documents_that_have_a_benchmark_in_them(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": "one two three four five six seven eight nine ten"}))
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": FRENCH[:300]}))
    curate("check", corpus, "--benchmarks", tmp_path / "other.jsonl", "--ngrams", 8)
    assert "80 documents: no 8-gram of a benchmark" in capsys.readouterr().out
    with pytest.raises(
        DataError, match=r"80 of 80 documents(.|\n)*fables\.jsonl, item 1: .* of exam(.|\n)*and 75 more"
    ):
        curate("check", corpus, "--benchmarks", tmp_path / "exam.jsonl", "--ngrams", 8)
