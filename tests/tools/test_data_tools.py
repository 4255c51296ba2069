"""The data tools as a user runs them, in processes of their own."""

import gzip
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megagap.data.indexed import IndexedDataset, IndexedDatasetWriter
from megagap.data.samples import TrainingData
from megagap.timeline import Phase, Source, Timeline
from megagap.tokenizer import load_tokenizer
from tests.launching import SECONDS
from tests.warm_start import python

TOOLS = Path(__file__).parents[2] / "tools"

RECIPE = """
[model]
preset = "tiny"
[data]
tokenizer = "bpe"
sources = [{path = "fr_text_document", weight = 2}, {path = "en_text_document", name = "english"}]
[train]
steps = 10
global_batch_size = 3
sequence_length = 16
seed = 5
"""


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python(), str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)


def succeed(tool: str, *arguments: object) -> str:
    done = run(tool, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora taken through the tools: a tokenizer, two pairs, a recipe."""
    folder = tmp_path_factory.mktemp("data")
    for name, word in (("fr", "bonjour [tout] le monde"), ("en", "hello [whole] world")):
        texts = [f"{word} {i}. " * (i % 5 + 1) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = (folder / "fr.jsonl", folder / "en.jsonl")
    succeed("train_tokenizer.py", "--input", *inputs, "--output", folder / "bpe", "--vocab-size", 290)
    for name in ("fr", "en"):
        arguments = ("--input", folder / f"{name}.jsonl", "--output-prefix", folder / name)
        printed = succeed(
            "preprocess_data.py", *arguments, "--tokenizer", folder / "bpe", "--append-eod", "--workers", 2
        )
        assert "40 documents" in printed and len(printed.splitlines()) == 1
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def test_inspect_shows_counts_and_text_of_a_pair(folder: Path) -> None:
    printed = succeed("inspect_data.py", folder / "fr_text_document", "--tokenizer", folder / "bpe", "--verify")
    assert f"{IndexedDataset(folder / 'fr_text_document').token_count:,}" in printed
    assert "bonjour [tout]" in printed
    assert "verified: every entry is valid" in printed and "the checksums are right" in " ".join(printed.split())
    assert "fr.jsonl" in printed and "append_eod" in printed


def test_verifying_finds_a_changed_byte_by_the_manifest(folder: Path, tmp_path: Path) -> None:
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"fr_text_document{ending}", tmp_path / f"fr{ending}")
    tokens = bytearray((tmp_path / "fr.bin").read_bytes())
    tokens[100] ^= 1
    (tmp_path / "fr.bin").write_bytes(tokens)
    assert run("inspect_data.py", tmp_path / "fr").returncode == 0
    done = run("inspect_data.py", tmp_path / "fr", "--verify")
    assert done.returncode == 2 and "fr.bin is damaged: its checksum is not" in done.stderr


def test_shards_of_two_tasks_are_merged(folder: Path, tmp_path: Path) -> None:
    arguments = ["--input", folder / "fr.jsonl", "--tokenizer", folder / "bpe", "--append-eod", "--workers", 1]
    for i in range(2):
        succeed("preprocess_data.py", *arguments, "--output-prefix", tmp_path / "fr", "--shard", f"{i}/2", "--resume")
    printed = succeed(
        "merge_datasets.py", "--input", *sorted(tmp_path.glob("*.idx")), "--output-prefix", tmp_path / "merged"
    )
    assert "40 documents" in printed
    assert (tmp_path / "merged.bin").read_bytes() == (folder / "fr_text_document.bin").read_bytes()
    refused = run("preprocess_data.py", *arguments, "--output-prefix", tmp_path / "fr", "--shard", "2/2")
    assert refused.returncode == 2 and "must be I/N with I from 0 to N - 1" in refused.stderr


def test_step_json_is_what_training_reads(folder: Path) -> None:
    printed = succeed("inspect_data.py", folder / "recipe.toml", "--train.seed", 7, "--step", 4, "--json")
    assert len(printed.splitlines()) == 1
    samples = json.loads(printed)
    sources = (
        Source("fr", (str(folder / "fr_text_document"),), 2),
        Source("english", (str(folder / "en_text_document"),), 1),
    )
    data = TrainingData(Timeline([Phase("all", None, 16, sources)], [(0, 3)]), seed=7)
    assert [sample["sample"] for sample in samples] == [9, 10, 11]
    assert [sample["tokens"] for sample in samples] == data.batch(9, 3).tolist()
    for sample in samples:
        assert list(sample) == ["sample", "source", "documents", "origins", "tokens"]
        pair = IndexedDataset(folder / {"fr": "fr_text_document", "english": "en_text_document"}[sample["source"]])
        joined = [token for document in sample["documents"] for token in pair[document].tolist()]
        assert any(joined[i : i + 17] == sample["tokens"] for i in range(len(joined)))


def test_a_step_beyond_the_end_is_refused_naming_the_last(folder: Path) -> None:
    assert succeed("inspect_data.py", folder / "recipe.toml", "--step", 10, "--json")
    for step in (11, 10**12):
        done = run("inspect_data.py", folder / "recipe.toml", "--step", step, "--json")
        assert done.returncode == 2 and "the run's last step is 10" in done.stderr and not done.stdout


def test_plan_json_is_one_line_and_the_picture_is_drawn(folder: Path, tmp_path: Path) -> None:
    arguments = ("--plan", "--json", "--output", tmp_path / "plan.png", "--train.steps", 7)
    printed = succeed("inspect_data.py", folder / "recipe.toml", *arguments)
    assert len(printed.splitlines()) == 1
    (phase,) = json.loads(printed)["phases"]
    assert phase["last_step"] == 7 and phase["tokens"] == 7 * 3 * 16
    assert [source["source"] for source in phase["sources"]] == ["fr", "english"]
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert "english" in succeed("inspect_data.py", folder / "recipe.toml", "--plan")


@pytest.mark.parametrize("entry", [-1, 99, 2**62])
def test_a_damaged_document_index_is_named(folder: Path, tmp_path: Path, entry: int) -> None:
    for ending in (".bin", ".idx"):
        shutil.copy(folder / f"fr_text_document{ending}", tmp_path / f"fr{ending}")
    index = bytearray((tmp_path / "fr.idx").read_bytes())
    index[-40 * 8 : -39 * 8] = entry.to_bytes(8, "little", signed=True)  # where document 1 starts, of 40
    (tmp_path / "fr.idx").write_bytes(index)
    done = run("inspect_data.py", tmp_path / "fr")
    assert done.returncode == 2 and "fr.idx is damaged: document" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("dtype", "value"), [("int32", -7), ("float32", 0.5)])
def test_numbers_that_are_no_token_ids_are_shown_but_not_decoded(
    folder: Path, tmp_path: Path, dtype: str, value: float
) -> None:
    with IndexedDatasetWriter(str(tmp_path / "odd"), np.dtype(dtype)) as writer:
        writer.add_document(np.array([3, value], dtype=dtype))
    assert f"3 {value}" in succeed("inspect_data.py", tmp_path / "odd").replace("3.0 ", "3 ")
    done = run("inspect_data.py", tmp_path / "odd", "--tokenizer", folder / "bpe")
    assert done.returncode == 2 and "odd.bin does not hold token ids: document 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_step_table_shows_text(folder: Path) -> None:
    printed = succeed("inspect_data.py", folder / "recipe.toml", "--step", 1)
    assert "monde" in printed or "world" in printed
    assert re.search(r"(fr|en)\.jsonl, lines? \d+", printed)


def test_a_step_names_the_lines_of_its_documents_and_says_which_source_does_not(folder: Path, tmp_path: Path) -> None:
    """The documents of ``fr`` were shuffled and merged from shards; those of ``en`` are of a pair without a map."""
    arguments = ("--input", folder / "fr.jsonl", "--output-prefix", tmp_path / "fr", "--tokenizer", folder / "bpe")
    for i in range(2):
        succeed("preprocess_data.py", *arguments, "--append-eod", "--shard", f"{i}/2")
    shards = [tmp_path / f"fr-0000{i}-of-00002_text_document" for i in range(2)]
    merged = tmp_path / "fr_text_document"
    succeed("merge_datasets.py", "--input", *shards, "--output-prefix", merged, "--shuffle-documents", 3)
    for ending in (".bin", ".idx"):
        shutil.copy(folder / f"en_text_document{ending}", tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE.replace('"bpe"', f'"{folder / "bpe"}"'))

    step = (tmp_path / "recipe.toml", "--train.global_batch_size", 9, "--step", 2)
    done = run("inspect_data.py", *step, "--json")
    assert done.returncode == 0 and "en_text_document has no manifest, which names input files" in done.stderr
    tokenizer, lines = load_tokenizer(folder / "bpe"), texts_of("fr")
    shown = json.loads(done.stdout)
    assert {sample["source"] for sample in shown} == {"fr", "english"}
    for sample in shown:
        if sample["source"] == "english":
            assert sample["origins"] == [None] * len(sample["documents"])
            continue
        assert {origin["file"] for origin in sample["origins"]} == {str(folder / "fr.jsonl")}
        texts = [lines[origin["line"] - 1] for origin in sample["origins"]]
        assert tokenizer.decode(sample["tokens"]) in "<|end_of_text|>".join([*texts, ""])
    printed = succeed("inspect_data.py", *step)
    assert "unknown" in printed and "en_text_document has no manifest" in printed


def test_of_a_run_its_recipe_is_asked_for(tmp_path: Path) -> None:
    for name in ("config.toml", "status.json"):
        (tmp_path / name).touch()
    done = run("inspect_data.py", tmp_path)
    assert done.returncode == 2 and f"{tmp_path} is a run, not a token file" in done.stderr
    assert f"inspect_data.py {tmp_path / 'config.toml'} --step N" in done.stderr


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("inspect_data.py", ["absent"], "data error: absent.idx does not exist"),
        ("inspect_data.py", ["absent.toml", "--step", "1"], "config error: cannot read the recipe"),
        ("inspect_data.py", ["absent.toml"], "either --step N or --plan"),
        ("inspect_data.py", ["absent.toml", "--plan", "--step", "1"], "--step N or --plan"),
        ("inspect_data.py", ["absent.toml", "--plan", "--output", "x.pdf"], "drawn as a .png"),
        ("inspect_data.py", ["absent", "--plan"], "apply to a RECIPE.toml"),
        ("inspect_data.py", ["absent", "--documnet", "3"], "not to a PREFIX (given: --documnet 3)"),
        ("inspect_data.py", ["absent", "--document", "3", "--search", "x"], "one of --document and --search, not both"),
        ("inspect_data.py", ["absent", "--document", "3", "--documents", "2"], "--documents does not apply"),
        ("inspect_data.py", ["absent", "--seed", "3"], "--seed applies only to --random"),
        ("inspect_data.py", ["absent", "--random", "0"], "--random must be at least 1, not 0"),
        ("inspect_data.py", ["absent.toml", "--step", "1", "--search", "x"], "--search applies to a PREFIX"),
        ("inspect_data.py", ["absent.toml", "--plan", "--verify"], "--verify applies to a PREFIX"),
        ("inspect_data.py", ["absent.toml", "--plan", "--tokenizer", "x"], "--tokenizer does not apply to --plan"),
        (
            "preprocess_data.py",
            ["--input", "absent", "--output-prefix", "x", "--tokenizer", "y"],
            "data error: cannot read absent",
        ),
        ("train_tokenizer.py", ["--input", "absent", "--output", "x", "--vocab-size", "300"], "data error"),
        ("train_tokenizer.py", ["--input", __file__, "--output", "x", "--vocab-size", "-5"], "is too small"),
        ("train_tokenizer.py", ["--input", __file__, "--output", "x", "--vocab-size", "9" * 30], "is too large"),
        ("train_tokenizer.py", ["--input", __file__, "--output", "x", "--vocab-size", f"{2**31}"], "is too large"),
        (
            "train_tokenizer.py",
            ["--input", __file__, "--output", f"{__file__}/x", "--vocab-size", "300"],
            "cannot create the folder",
        ),
        ("inspect_data.py", ["absent", "--documents", "-5"], "--documents must be at least 0"),
        ("inspect_data.py", ["absent.toml", "--step", "0"], "counted from 1, not 0"),
        ("inspect_data.py", ["absent.toml", "--step", "-3"], "counted from 1, not -3"),
    ],
)
def test_user_faults_exit_2_with_a_message_and_no_traceback(tool: str, arguments: list[str], message: str) -> None:
    done = run(tool, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_several_keys_of_compressed_text_with_bad_lines_skipped(folder: Path, tmp_path: Path) -> None:
    documents = [{"text": f"bonjour {i}", "title": f"{i}"} for i in range(30)]
    lines = [json.dumps(document) for document in documents] + ["{"] * 7
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    arguments = ["--input", tmp_path / "a.jsonl.gz", "--output-prefix", tmp_path / "a", "--tokenizer", folder / "bpe"]
    arguments += ["--json-keys", "text", "title", "--workers", 1]
    stopped = run("preprocess_data.py", *arguments)
    assert stopped.returncode == 2
    assert "a.jsonl.gz, line 31: not valid JSON" in stopped.stderr
    skipped = run("preprocess_data.py", *arguments, "--on-error", "skip")
    assert skipped.returncode == 0
    assert [line.split(": ")[1].split(",")[0] for line in skipped.stdout.splitlines()] == ["30 documents"] * 2
    assert "warning: 7 documents were skipped" in skipped.stderr
    assert "line 35: not valid JSON" in skipped.stderr and "line 36" not in skipped.stderr
    for key in ("text", "title"):
        assert IndexedDataset(tmp_path / f"a_{key}_document").document_count == 30


def test_short_text_warns_that_ids_are_missing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcabc")
    done = run("train_tokenizer.py", "--input", tmp_path / "a.txt", "--output", tmp_path / "t", "--vocab-size", 500)
    assert done.returncode == 0
    assert "warning: the text has only enough pairs" in done.stderr
    assert "trained on 1 document (6 bytes of text, uncompressed)" in done.stdout
    assert "bytes per token, measured on all of it" in done.stdout
    again = run("train_tokenizer.py", "--input", tmp_path / "a.txt", "--output", tmp_path / "t", "--vocab-size", 500)
    assert again.returncode == 2 and "t has a tokenizer already: tokenizer.json" in again.stderr


@pytest.mark.parametrize(
    "arguments",
    [["fr_text_document", "--documents", 40], ["recipe.toml", "--step", 1], ["recipe.toml", "--plan"],
     ["recipe.toml", "--step", 1, "--json"]],
    ids=lambda arguments: " ".join(map(str, arguments)),
)  # fmt: skip
def test_a_reader_that_has_seen_enough_ends_a_tool_quietly(folder: Path, arguments: list[object]) -> None:
    """As ``| head -1`` does; here the reader is gone before the first line."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [
        python(),
        str(TOOLS / "inspect_data.py"),
        str(folder / str(arguments[0])),
        *map(str, arguments[1:]),
    ]
    with os.fdopen(write_end, "wb") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")


def texts_of(name: str) -> list[str]:
    word = {"fr": "bonjour [tout] le monde", "en": "hello [whole] world"}[name]
    return [f"{word} {i}. " * (i % 5 + 1) for i in range(40)]


def test_one_document_is_shown_whole_with_the_tokenizer_of_the_manifest(folder: Path) -> None:
    prefix = folder / "fr_text_document"
    printed = succeed("inspect_data.py", prefix, "--document", 39)
    count = len(IndexedDataset(prefix).document(39))
    assert printed == f"document 39 of {prefix}: {count} tokens\n{texts_of('fr')[39]}<|end_of_text|>\n"
    shown = json.loads(succeed("inspect_data.py", prefix, "--document", 39, "--json"))
    assert shown == {
        "document": 39,
        "tokens": IndexedDataset(prefix).document(39).tolist(),
        "text": f"{texts_of('fr')[39]}<|end_of_text|>",
    }
    ids = succeed("inspect_data.py", prefix, "--document", 39, "--tokenizer", "")
    assert ids.splitlines()[1] == " ".join(map(str, shown["tokens"]))


@pytest.mark.parametrize("number", [40, -1, 10**30])
def test_a_document_that_does_not_exist_is_refused_with_those_that_do(folder: Path, number: int) -> None:
    done = run("inspect_data.py", folder / "fr_text_document", "--document", number)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        f"data error: there is no document {number} in {folder / 'fr_text_document'}: "
        "it has 40 documents, numbered 0 to 39\n"
    )


def test_random_documents_are_drawn_by_the_seed(folder: Path) -> None:
    drawn = [
        json.loads(succeed("inspect_data.py", folder / "en_text_document", "--random", 5, "--seed", seed, "--json"))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    numbers = [document["document"] for document in drawn[0]["shown"]]
    assert len({*numbers}) == 5
    for document in drawn[0]["shown"]:
        assert document["text"] == f"{texts_of('en')[document['document']]}<|end_of_text|>"
    printed = succeed("inspect_data.py", folder / "en_text_document", "--random", 99)
    assert "40 of 40 documents, drawn with seed 0" in printed


def test_text_is_found_across_tokens_with_its_place_and_count(folder: Path) -> None:
    prefix, text = folder / "fr_text_document", "nde 13. bonj"
    found = json.loads(succeed("inspect_data.py", prefix, "--search", text, "--json"))
    assert (found["documents"], found["found_in"], found["occurrences"]) == (40, 1, 3)
    (hit,) = found["hits"]
    assert (hit["document"], hit["occurrences"], hit["position"]) == (13, 3, texts_of("fr")[13].index(text))
    assert text in hit["context"]
    printed = succeed("inspect_data.py", prefix, "--search", "monde", "--documents", 2)
    assert "120 occurrences in 40 of 40 documents" in printed and "and 38 more documents" in printed
    assert "decoded" in printed and str(folder / "bpe") in printed


def test_what_cannot_be_searched_is_refused(folder: Path, tmp_path: Path) -> None:
    done = run("inspect_data.py", folder / "fr_text_document", "--search", "")
    assert done.returncode == 2 and "every document contains it" in done.stderr
    for ending in (".bin", ".idx"):
        shutil.copy(folder / f"fr_text_document{ending}", tmp_path / f"fr{ending}")
    done = run("inspect_data.py", tmp_path / "fr", "--search", "x")
    assert done.returncode == 2
    assert "needs a tokenizer" in done.stderr and "no manifest" in done.stderr and "--tokenizer" in done.stderr


def moved_pair(folder: Path, target: Path, spec: Path) -> Path:
    """A copy whose manifest names another tokenizer."""
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"fr_text_document{ending}", target / f"fr{ending}")
    manifest = json.loads((target / "fr.json").read_text())
    manifest["tokenizer"]["spec"] = str(spec)
    (target / "fr.json").write_text(json.dumps(manifest))
    return target / "fr"


def test_a_tokenizer_that_is_gone_or_another_one_is_not_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("quite another text")
    succeed("train_tokenizer.py", "--input", tmp_path / "text.txt", "--output", tmp_path / "t", "--vocab-size", 260)
    for spec, reason in ((tmp_path / "gone", "gone does not exist"), (tmp_path / "t", "is no longer the tokenizer")):
        done = run("inspect_data.py", moved_pair(folder, tmp_path, spec))
        assert done.returncode == 0 and "bonjour" not in done.stdout
        assert "note: " in done.stderr and reason in done.stderr
        assert "only ids are shown. Name the tokenizer with --tokenizer" in done.stderr
    assert "bonjour" in succeed("inspect_data.py", tmp_path / "fr", "--tokenizer", folder / "bpe")


def test_a_pair_without_documents_says_so(tmp_path: Path) -> None:
    with IndexedDatasetWriter(str(tmp_path / "none"), "uint16"):
        pass
    assert json.loads(succeed("inspect_data.py", tmp_path / "none", "--json"))["shown"] == []
    for option in ("--document", "--random"):
        done = run("inspect_data.py", tmp_path / "none", option, 1)
        assert done.returncode == 2 and "no documents" in done.stderr


def test_json_of_a_pair_is_one_object_with_whole_documents(folder: Path) -> None:
    shown = json.loads(succeed("inspect_data.py", folder / "fr_text_document", "--verify", "--documents", 1, "--json"))
    dataset = IndexedDataset(folder / "fr_text_document")
    assert (shown["documents"], shown["tokens"], shown["verified"]) == (40, dataset.token_count, True)
    assert shown["manifest"]["content_bytes"] == (folder / "fr.jsonl").stat().st_size
    assert [document["tokens"] for document in shown["shown"]] == [dataset.document(0).tolist()]


def test_long_names_are_whole_in_a_pipe(folder: Path, tmp_path: Path) -> None:
    prefix, source = tmp_path / ("n" * 200), "web[en]_" + "s" * 180
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"fr_text_document{ending}", f"{prefix}{ending}")
    recipe = RECIPE.replace('"bpe"', f'"{folder / "bpe"}"').replace(
        '"fr_text_document"', f'"{prefix}", name = "{source}"'
    )
    recipe = recipe.replace('"en_text_document"', f'"{folder / "en_text_document"}"')
    (tmp_path / "recipe.toml").write_text(recipe)
    assert f"{prefix}\n" in succeed("inspect_data.py", prefix).replace(" ", "")
    assert f" {source} " in succeed("inspect_data.py", tmp_path / "recipe.toml", "--plan")
    assert f" {source} " in succeed("inspect_data.py", tmp_path / "recipe.toml", "--step", 1)


def test_the_summary_says_uncompressed_bytes_and_no_rate_for_work_not_done(folder: Path, tmp_path: Path) -> None:
    text = "".join(json.dumps({"text": text}) + "\n" for text in texts_of("fr") * 500)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    arguments = ["--input", tmp_path / "a.jsonl.gz", "--output-prefix", tmp_path / "a", "--tokenizer", folder / "bpe"]
    arguments += ["--workers", 1, "--fast", "off", "--resume"]
    first = succeed("preprocess_data.py", *arguments)
    size, stored = f"{len(text) / 1e6:.1f} MB", f"{(tmp_path / 'a.jsonl.gz').stat().st_size / 1e3:.1f} kB"
    assert f"from {size} of uncompressed input ({stored} in files) in " in first and "B/s)" in first
    again = run("preprocess_data.py", *arguments)
    assert f"from {size} of uncompressed input ({stored} in files), by an earlier run\n" in again.stdout
    assert "B/s" not in again.stdout and "nothing was done" in again.stderr
