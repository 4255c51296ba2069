"""gigatoken is used only where its ids are those of the tokenizer's own library."""

import builtins
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagap.errors import DataError
from megagap.preprocess import preprocess
from megagap.tokenizer import Tokenizer, fingerprint, load_tokenizer
from megagap.tokenizer.fast import FastEncoder, FastSource
from megagap.tokenizer.tiktoken import json_of_ranks
from tests.warm_start import python

pytest.importorskip("gigatoken")


@pytest.mark.parametrize("kind", ["bpe_of_lines", "rank_file"])
def test_ids_are_those_of_the_reference(request: pytest.FixtureRequest, lines: list[str], kind: str) -> None:
    reference = load_tokenizer(request.getfixturevalue(kind))
    fast = FastEncoder(FastSource.of(reference))
    fast.check(reference, lines)
    expected, lengths = reference.encode_flat(lines)
    found, found_lengths = fast.encode_flat(lines)
    assert np.array_equal(expected, found) and np.array_equal(lengths, found_lengths)


def test_llama_3_ids_are_those_of_the_reference(lines: list[str]) -> None:
    llama3 = pytest.importorskip("llama_models.llama3.tokenizer")
    reference = load_tokenizer(Path(llama3.__file__).with_name("tokenizer.model"))
    FastEncoder(FastSource.of(reference)).check(reference, [*lines, "a <|end_of_text|> written out", *hard(reference)])


def hard(tokenizer: Tokenizer) -> list[str]:
    """Each token alone, some of which no merges lead to; and words that can be merged in many ways."""
    tokens = [token.decode(errors="replace") for token in tokenizer.vocabulary().values()]
    draw = random.Random(0)
    letters = ("a", "ab", "=-", "*/", " \t", "\n ", "ha", "àé", "的一", "ing", "()", "คก", "0o")
    return tokens + ["".join(draw.choices(draw.choice(letters), k=draw.randint(2, 40))) for _ in range(20_000)]


def test_the_word_cache_is_emptied_when_it_takes_too_much_memory(
    rank_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megagap.tokenizer.fast.CACHE_BYTES", 1 << 24)
    reference = load_tokenizer(rank_file)
    fast = FastEncoder(FastSource.of(reference))
    random = np.random.default_rng(0)
    backends = {id(fast._backend): fast._backend}
    for _ in range(60):
        letters = random.integers(97, 123, 500_000, dtype=np.uint8)
        letters[random.integers(0, len(letters), 70_000)] = ord(" ")
        found, _ = fast.encode_flat([letters.tobytes().decode()])
        if id(fast._backend) not in backends:
            break
    else:
        pytest.fail("it never forgot")
    assert np.array_equal(found, reference.encode_flat([letters.tobytes().decode()])[0])


def test_very_long_white_space_is_cut_as_in_the_reference(rank_file: Path) -> None:
    reference = load_tokenizer(rank_file)
    blanks = " " * 400_002, "\n" * 250_000 + " " * 250_001
    FastEncoder(FastSource.of(reference)).check(reference, ["a", *(f"a{blank}b" for blank in blanks), "", "b"])


@pytest.mark.parametrize("workers", [1, 2])
def test_files_of_all_back_ends_for_one_vocabulary_are_the_same(
    tmp_path: Path, corpus: Path, rank_file: Path, workers: int
) -> None:
    """The rank file by tiktoken and gigatoken, and as a tokenizer.json by tokenizers and gigatoken."""
    (tmp_path / "same.json").write_text(json_of_ranks(load_tokenizer(rank_file).vocabulary()))
    written = []
    for i, (tokenizer, fast) in enumerate(
        [(rank_file, "off"), (rank_file, "on"), (tmp_path / "same.json", "off"), (tmp_path / "same.json", "on")]
    ):
        preprocess([corpus], str(tmp_path / str(i)), str(tokenizer), workers=workers, fast=fast)  # type: ignore[arg-type]
        written.append([(tmp_path / f"{i}_text_document{ending}").read_bytes() for ending in (".bin", ".idx")])
    assert all(files == written[0] for files in written)
    assert fingerprint(load_tokenizer(rank_file)) == fingerprint(load_tokenizer(tmp_path / "same.json"))


class Wrong(FastEncoder):
    def encode_flat(self, texts: Any) -> Any:
        tokens, lengths = super().encode_flat(texts)
        wrong = np.array(tokens)
        wrong[np.cumsum(lengths)[["whisky" in text for text in texts]] - 1] = 0
        return wrong, lengths


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from megagap.preprocess import fast

    monkeypatch.setattr(fast, "FastEncoder", Wrong)


def test_a_difference_on_the_input_refuses_or_falls_back(
    tmp_path: Path, corpus: Path, bpe_of_lines: Path, wrong: None
) -> None:
    arguments: tuple[Any, ...] = ([corpus], str(tmp_path / "out"), str(bpe_of_lines))
    with pytest.raises(DataError, match=r"--fast on is not possible: gigatoken 0.* gives different ids .* of 'Portez"):
        preprocess(*arguments, fast="on")
    assert not list(tmp_path.glob("out*"))
    summary = preprocess(*arguments, fast="auto")
    assert "the tokenizer's own library is used: gigatoken" in summary.notes[0]
    preprocess([corpus], str(tmp_path / "off"), str(bpe_of_lines), fast="off")
    assert (tmp_path / "out_text_document.bin").read_bytes() == (tmp_path / "off_text_document.bin").read_bytes()


def test_a_difference_late_in_a_long_file_is_found(
    tmp_path: Path, bpe_of_lines: Path, wrong: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last twelfth, of which a sixteenth is looked at."""
    monkeypatch.setattr("megagap.preprocess.fast.SAMPLE_BYTES", 1 << 13)
    with open(tmp_path / "long.jsonl", "w") as file:
        for i in range(6_000):
            file.write(json.dumps({"text": f"{'whisky' if i > 5_500 else 'water'} {i}. " * 4}) + "\n")
    assert (tmp_path / "long.jsonl").stat().st_size > 2 * 16 * (1 << 13)
    with pytest.raises(DataError, match="gives different ids"):
        preprocess([tmp_path / "long.jsonl"], str(tmp_path / "out"), str(bpe_of_lines), fast="on")


def test_a_difference_on_text_that_the_input_does_not_contain_refuses(
    tmp_path: Path, corpus: Path, sentencepiece_model: Path
) -> None:
    """gigatoken takes ``</s>``, which also occurs in HTML, as the end of a document."""
    with pytest.raises(DataError, match="gives different ids"):
        preprocess([corpus], str(tmp_path / "out"), str(sentencepiece_model), fast="on")


def test_a_short_file_is_compared_to_its_end(
    tmp_path: Path, bpe_of_lines: Path, wrong: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megagap.preprocess.fast.SAMPLE_BYTES", 1 << 13)
    lines = [json.dumps({"text": "water " * 20})] * 900 + [json.dumps({"text": "whisky"})]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="gives different ids"):
        preprocess([tmp_path / "short.jsonl"], str(tmp_path / "out"), str(bpe_of_lines), fast="on")


def test_without_gigatoken_on_is_refused_and_auto_continues(
    tmp_path: Path, corpus: Path, bpe_of_lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == "gigatoken":
            raise ImportError("No module named 'gigatoken'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    arguments: tuple[Any, ...] = ([corpus], str(tmp_path / "out"), str(bpe_of_lines))
    with pytest.raises(
        DataError, match=r"--fast on is not possible: gigatoken cannot be imported(.|\n)*megagap\[fast\]"
    ):
        preprocess(*arguments, fast="on")
    assert "cannot be imported" in preprocess(*arguments, fast="auto").notes[0]


def test_a_tokenizer_that_makes_gigatoken_panic_falls_back(
    tmp_path: Path, corpus: Path, rank_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(source: str) -> None:
        raise BaseException("panicked")  # as errors in Rust come to Python

    import gigatoken

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", panic)
    with pytest.raises(DataError, match=r"cannot load .*panicked"):
        preprocess([corpus], str(tmp_path / "out"), str(rank_file), fast="on")
    assert preprocess([corpus], str(tmp_path / "out"), str(rank_file), fast="auto").pairs[0].documents == 200


def test_the_tool_uses_it_by_default(tmp_path: Path, corpus: Path, bpe_of_lines: Path) -> None:
    tool = Path(__file__).parents[2] / "tools/preprocess_data.py"
    command = [
        python(),
        tool,
        "--input",
        corpus,
        "--output-prefix",
        tmp_path / "out",
        "--tokenizer",
        bpe_of_lines,
    ]
    done = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 0 and "own library" not in done.stderr, done.stderr
