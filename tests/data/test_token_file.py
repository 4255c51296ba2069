"""A format of token files that is registered is read wherever token files are."""

import numpy as np
import pytest

from megagap.config import load_recipe
from megagap.data.identity import identify
from megagap.data.token_file import TokenFile, open_tokens
from megagap.token_formats import FORMATS, TokenFormat
from megagap.training.datasets import training_data
from tests.few import WriteTokens
from tests.recipes import write_recipe


class Flat(TokenFile):
    """uint16 tokens in ``.tokens``, and in ``.ends`` where each document ends, int64."""

    def __init__(self, prefix):
        super().__init__(str(prefix), ".ends", ".tokens")
        ends = np.fromfile(self.index_path, "<i8")
        self.dtype = np.dtype("<u2")
        self.tokens = np.memmap(self.tokens_path, self.dtype, "r")
        self.lengths = np.diff(ends, prepend=0).astype(np.int32)
        self.pointers = (ends - self.lengths) * 2
        self.document_indices = np.arange(len(ends) + 1)


DOCUMENTS = [np.arange(start, start + length) % 60 for start, length in ((0, 50), (7, 300), (20, 111), (33, 90))]


@pytest.fixture
def both(tmp_path, write_tokens: WriteTokens):
    """The same documents in two formats: their prefixes."""
    (tmp_path / "a").mkdir()
    megatron, flat = write_tokens("a/megatron", DOCUMENTS), str(tmp_path / "a/flat")
    np.concatenate(DOCUMENTS).astype("<u2").tofile(f"{flat}.tokens")
    np.cumsum([len(document) for document in DOCUMENTS]).astype("<i8").tofile(f"{flat}.ends")
    FORMATS.append(TokenFormat(".ends", ".tokens", f"{__name__}:Flat"))
    yield megatron, flat
    FORMATS.pop()


def test_a_prefix_or_one_of_its_files_opens_in_its_format(both):
    expected = [list(document) for document in DOCUMENTS]
    for name in (both[1], f"{both[1]}.tokens", f"{both[1]}.ends"):
        opened = open_tokens(name)
        assert type(opened).__name__ == "Flat" and [list(document) for document in opened] == expected
    assert type(open_tokens(both[0])).__name__ == "IndexedDataset"


def test_a_run_trains_on_the_same_samples(both, tmp_path):
    samples = []
    for prefix in both:
        settings = load_recipe(write_recipe(tmp_path), [f'data.sources=[{{path="{prefix}", name="x"}}]'], 1)
        data = training_data(settings)
        samples.append([data.tokens(position).tolist() for position in range(5)])
    assert samples[0] == samples[1]


def test_patterns_find_files_of_every_format(both, tmp_path):
    source = f'data.sources=[{{path="{tmp_path}/a/*", name="x"}}]'
    settings = load_recipe(write_recipe(tmp_path), [source], 1)
    assert set(settings.data.sources[0].paths) == set(both)


def test_a_changed_file_is_told_apart(both):
    before = identify(str(both[1]))
    with open(f"{both[1]}.tokens", "r+b") as file:
        file.write(b"\x01")
    assert identify(str(both[1])) != before
