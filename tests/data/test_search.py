"""Text that is found in token files, against a search of the texts themselves."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megagap.data.indexed import IndexedDataset, IndexedDatasetWriter
from megagap.data.search import CONTEXT, as_stored, search
from megagap.errors import DataError
from megagap.tokenizer import Tokenizer, load_tokenizer


def written(path: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> IndexedDataset:
    with IndexedDatasetWriter(path, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype))
    return IndexedDataset(path)


@pytest.fixture(params=["tokenizer_folder", "rank_file", "sentencepiece_model"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


def test_every_piece_of_a_text_is_found_wherever_tokens_begin_and_end(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str]
) -> None:
    dataset = written(tmp_path / "pair", [tokenizer.encode(text) for text in texts * 3])
    stored = [as_stored(tokenizer, text) for text in texts * 3]
    draw = random.Random(0)
    for _ in range(30):
        text = draw.choice(stored)
        start = draw.randrange(len(text))
        piece = text[start : start + draw.randint(1, 12)]
        found = search(dataset, tokenizer, piece, most=2)
        containing = [i for i, text in enumerate(stored) if piece in text]
        assert (found.found_in, found.documents) == (len(containing), len(stored))
        assert found.occurrences == sum(text.count(piece) for text in stored)
        assert [hit.document for hit in found.hits] == containing[:2]
        for hit in found.hits:
            assert hit.position == stored[hit.document].index(piece)
            ids = dataset.document(hit.document).tolist()
            before, through = (tokenizer.decode(ids[: hit.token + more]) for more in (0, 1))
            assert len(before.rstrip("\ufffd")) <= hit.position < len(through.rstrip("\ufffd"))


def test_the_context_surrounds_the_text_in_one_line(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    text = "a" * 100 + "\n\x1b[31mneedle\t" + "b" * 100
    (hit,) = search(written(tmp_path / "pair", [tokenizer.encode(text)]), tokenizer, "needle", most=1).hits
    assert hit.context == "…" + "a" * (CONTEXT - 6) + r"\n\x1b[31mneedle\t" + "b" * (CONTEXT - 1) + "…"


def test_text_does_not_span_documents(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    dataset = written(tmp_path / "pair", [tokenizer.encode("one two"), tokenizer.encode("three")])
    assert search(dataset, tokenizer, "twothree", most=1).found_in == 0


def test_ids_outside_the_vocabulary_are_left_out_of_the_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = [2**40, *tokenizer.encode("needle"), 2**62]
    (hit,) = search(written(tmp_path / "pair", [ids], "int64"), tokenizer, "needle", most=1).hits
    assert (hit.position, hit.token) == (0, 1)


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("\udcff", "not valid UTF-8")])
def test_what_is_not_a_text_is_refused(tmp_path: Path, tokenizer_folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        search(written(tmp_path / "pair", [[1]]), load_tokenizer(tokenizer_folder), text, most=1)


def test_numbers_that_are_not_ids_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="does not hold token ids: document 1"):
        search(written(tmp_path / "pair", [[1], [-1]], "int32"), load_tokenizer(tokenizer_folder), "x", most=1)
