"""A file that is named as an input and is not text for training is refused with what it is and what to do."""

import json
import subprocess
from pathlib import Path

import pytest

from megagap.errors import DataError
from megagap.preprocess import preprocess
from megagap.preprocess.kinds import kind_of
from megagap.preprocess.listing import find_inputs


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ('[\n{"text":"a"},\n{"text":"b"}\n]\n', r"jq -c '\.\[\]' {path} > {stem}\.jsonl"),
        ('[{"text": "a"}, {"text": "b"}]', r"jq -c '\.\[\]' {path}"),
        ("[]", r"jq -c '\.\[\]' {path}"),
        ('\n\n [\n  {\n    "text": "a"\n  }\n]', r"jq -c '\.\[\]' {path}"),
        ('["a", "b"]', r"jq -c '\.\[\]' {path}"),
        ('{\n "text": "a"\n}\n', r"jq -c \. {path} > {stem}\.jsonl"),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}\n', r"jq -c \. {path}"),
        ('{"text": "a",\n "id": 1}\n', r"jq -c \. {path}"),
        ('{"data": [\n{"text": "a"},\n{"text": "b"}\n]}', r"jq -c \. {path}"),
        ("text,id\na,1\nb,2\n", r"pandas\.read_csv\('{path}'\)"),
        ("text\tid\na\t1\n", r"pandas\.read_csv\('{path}', sep='\\t'\)"),
        ("<html><body>", "extract its text"),
        ('<?xml version="1.0"?>\n', "extract its text"),
        ("Just some prose.\n", r"name a plain text \*\.txt"),
        ("1\n2\n", "give one JSON object per line"),
        ("%PDF-1.4", "extract its text first"),
        ("ARROW1\0\0", r"load_from_disk"),
        ("\x1f\x08a,b\nc,d\n", "give one JSON object per line"),
    ],
)
def test_the_message_says_what_to_do(tmp_path: Path, tokenizer_folder: Path, content: str, advice: str) -> None:
    path = tmp_path / "my data.json"
    path.write_text(content)
    if "jq" in advice:
        advice = advice.format(path=f"'{path}'", stem=f"'{path.with_suffix('')}'").replace("'\\.jsonl", r"'\.jsonl")
    advice = advice.format(path=path)
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError, match=advice):
            preprocess([path], str(tmp_path / "out"), str(tokenizer_folder), on_error=on_error)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("content", ['[\n{"text":"a"},\n{"text":"b"}\n]\n', '{\n "text": "a"\n}\n{\n"text":"b"}'])
def test_the_command_of_the_message_makes_json_lines(tmp_path: Path, content: str) -> None:
    path = tmp_path / "it's.json"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        find_inputs([path])
    command = str(error.value).partition("convert it: ")[2]
    try:
        subprocess.run(command, shell=True, check=True)
    except subprocess.CalledProcessError:
        pytest.skip("jq is not installed")
    lines = path.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    "first",
    ["[1, 2]", '{"text": "cut', "garbage", '{"text": 3}', "{", '{"a": [', "null"],
)
def test_a_bad_first_line_of_json_lines_is_a_fault_of_that_line(
    tmp_path: Path, tokenizer_folder: Path, first: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{first}\n{{"text": "fine"}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: "):
        preprocess([path], str(tmp_path / "out"), str(tokenizer_folder))
    summary = preprocess([path], str(tmp_path / "out"), str(tokenizer_folder), on_error="skip")
    assert (summary.skipped, summary.pairs[0].documents) == (1, 1)


def test_the_format_of_a_pipes_first_bytes_is_not_judged() -> None:
    assert kind_of("/dev/stdin", b'{"te', 0, False) == "lines"
    assert kind_of("/dev/stdin", b"[", 0, False) == "lines"


@pytest.mark.parametrize("ending", ["", ".bin", ".idx", ".json", ".origins"])
def test_a_token_file_as_an_input_is_distinguished_from_text(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, ending: str
) -> None:
    prefix = preprocess([corpus], str(tmp_path / "out"), str(tokenizer_folder)).pairs[0].prefix
    with pytest.raises(DataError, match=r"a token file, not text\n.* give the text that it was made from"):
        preprocess([prefix + ending], str(tmp_path / "new"), str(tokenizer_folder))


def test_a_saved_dataset_of_hugging_face_says_how_to_write_it_as_json_lines(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"text": ["one"]})
    with pa.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "dataset_info.json").write_text('{\n  "builder_name": "json"\n}')
    (tmp_path / "state.json").write_text('{\n  "_data_files": []\n}')
    with pytest.raises(DataError, match=r"arrow: is an Arrow file, such as datasets\.save_to_disk writes"):
        find_inputs([tmp_path])
    with pytest.raises(DataError, match=r"load_from_disk\(FOLDER\)\.to_json\("):
        find_inputs([tmp_path / "data-00000-of-00001.arrow"])


def test_a_first_line_with_a_huge_integer_is_read_as_any_other(tmp_path: Path) -> None:
    """Python refuses more than 4,300 digits; no number's value is used."""
    lines = [json.dumps({"text": "ok"}).replace("{", '{"id": ' + "7" * 5000 + ", "), json.dumps({"text": "b"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [found.path for found in find_inputs([tmp_path / "a.jsonl"])] == [str(tmp_path / "a.jsonl")]
    (tmp_path / "b.jsonl").write_text(lines[0].replace(', "text"', ',\n "text"'))
    with pytest.raises(DataError, match="is JSON spread over several lines"):
        find_inputs([tmp_path / "b.jsonl"])
