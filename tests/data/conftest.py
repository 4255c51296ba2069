"""Small token files and tokenizers for the tests of the data room."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megagap.data.bpe import train_tokenizer
from megagap.data.indexed import IndexedDatasetWriter

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Portez ce vieux whisky au juge blond qui fume.\n\n  Déjà vu?",
    "def f(x):\n    return [x ** 2 for _ in range(1024)]\n",
    "It's 3.14159, isn't it? 你好 🙂",
]

WriteTokens = Callable[[str, Sequence[Sequence[int]]], str]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """English, French, code, and what lies beyond."""
    return TEXTS


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteTokens:
    """Writes documents of token ids and returns their prefix."""

    def write(name: str, documents: Sequence[Sequence[int]]) -> str:
        prefix = str(tmp_path / name)
        with IndexedDatasetWriter(prefix, "uint16") as writer:
            for document in documents:
                writer.add_document(document)
        return prefix

    return write


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 3))
    train_tokenizer([text], folder / "bpe", 300)
    return folder / "bpe"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """JSON lines of the sample texts many times over, an empty document and a blank line among them."""
    lines = [json.dumps({"id": i, "text": TEXTS[i % len(TEXTS)] + str(i)}) for i in range(200)]
    lines[7:7] = ['{"text": ""}', ""]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
