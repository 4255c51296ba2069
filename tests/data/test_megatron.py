"""Megatron's order against a naive program written from its description, and against megatron-core if installed."""

import importlib
import importlib.util
import types
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagap.data.indexed import IndexedDatasetWriter
from megagap.errors import DataError
from megagap.timeline import Source
from tests.data.naive_megatron import mixture_samples
from tests.few import training

Written = tuple[list[Source], list[list[list[int]]]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Written]:
    """Sources of random documents, some empty, all tokens of a source different; and the same as lists."""

    def write(weights: list[float], documents: int = 30, longest: int = 40) -> Written:
        random = np.random.default_rng(len(weights) * 1000 + documents)
        sources, contents = [], []
        for i, weight in enumerate(weights):
            prefix, token, content = str(tmp_path / f"s{i}"), 0, []
            with IndexedDatasetWriter(prefix, "int32") as writer:
                for length in random.integers(0, longest, documents + 3 * i):
                    content.append(list(range(token, token + int(length))))
                    token += int(length)
                    writer.add_document(content[-1])
            sources.append(Source(f"s{i}", (prefix,), weight))
            contents.append(content)
        return sources, contents

    return write


def ours(sources: list[Source], samples: int, length: int, seed: int, split: str = "100,0,0") -> list[list[int]]:
    return training(sources, seed, length, steps=samples, split=split, megatron=True).batch(0, samples).tolist()


TWELVE = [0.21, 0.17, 0.13, 0.11, 0.09, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01]


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [1, 3], TWELVE], ids=["1", "2", "2 ratios", "12"])
@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize(("seed", "split"), [(0, "100,0,0"), (1234, "90,5,5"), (7, "33,33,34")])
def test_megatron_order_equals_the_naive_program(
    write: Callable[..., Written], weights: list[float], length: int, seed: int, split: str
) -> None:
    """From a part of an epoch to several, the last of which is below and above 0.8 of its samples."""
    sources, contents = write(weights)
    share = float(split.split(",")[0]) / 100
    parts = [content[: round(share * len(content))] for content in contents]
    epoch = (sum(map(len, parts[0])) - 1) // length
    for epochs in (0.3, 1, 1.5, 1.79, 1.85, 2, 3.2, 3.95):
        samples = max(1, int(epochs * epoch / weights[0] * sum(weights)))
        expected = mixture_samples(parts, weights, samples, length, seed)
        assert ours(sources, samples, length, seed, split) == expected, epochs


def test_every_sample_count_around_the_threshold_of_a_separate_last_epoch_is_right(
    write: Callable[..., Written],
) -> None:
    sources, contents = write([1.0], documents=12, longest=20)
    epoch = (sum(map(len, contents[0])) - 1) // 4
    for samples in range(1, 3 * epoch + 3):
        assert ours(sources, samples, 4, 3) == mixture_samples(contents, [1.0], samples, 4, 3), samples


def test_shards_are_one_source(write: Callable[..., Written], tmp_path: Path) -> None:
    (first, second), contents = write([1.0, 1.0])
    joined = [[*contents[0], *contents[1]]]
    both = Source("both", first.prefixes + second.prefixes)
    assert ours([both], 200, 5, 1) == mixture_samples(joined, [1.0], 200, 5, 1)


def test_a_shard_of_empty_documents_counts_as_in_one_file(tmp_path: Path) -> None:
    contents: list[list[list[int]]] = [[[1, 2, 3], [4, 5]], [[], [], []], [[6, 7, 8, 9]]]
    for i, documents in enumerate(contents):
        with IndexedDatasetWriter(str(tmp_path / str(i)), "int32") as writer:
            for document in documents:
                writer.add_document(document)
    both = Source("x", tuple(str(tmp_path / str(i)) for i in range(3)))
    assert ours([both], 9, 2, 1) == mixture_samples([sum(contents, [])], [1.0], 9, 2, 1)


def test_samples_beyond_the_plan_are_refused(write: Callable[..., Written]) -> None:
    sources, _ = write([0.7, 0.3])
    data = training(sources, 1, 5, steps=20, megatron=True)
    assert data.batch(0, 20).shape == (20, 6)
    with pytest.raises(DataError, match="plans 20 samples, and number 20 is beyond"):
        data.batch(19, 2)


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3]])
def test_a_run_that_skips_samples_makes_all_its_steps(write: Callable[..., Written], weights: list[float]) -> None:
    sources, _ = write(weights)
    skipping = training(sources, 1, 5, steps=20, skip=[(3, 5), (20, 21)], megatron=True)
    whole = ours(sources, 20, 5, 1)
    tokens = skipping.batch(0, 20).tolist()
    assert tokens[:18] == whole[:3] + whole[5:] and all(extra not in whole for extra in tokens[18:])


def test_more_skipped_samples_than_megatrons_surplus_is_refused_at_once(write: Callable[..., Written]) -> None:
    sources, contents = write([1.0])
    held = (sum(map(len, contents[0])) - 1) // 5
    training(sources, 1, 5, steps=20, skip=[(3, 3 + held - 20)], megatron=True)
    with pytest.raises(DataError, match=f"needs at least {held + 1} samples of source s0, .* has {held}"):
        training(sources, 1, 5, steps=20, skip=[(3, 10**15)], megatron=True)


def test_positions_count_from_the_start_of_each_document(write: Callable[..., Written]) -> None:
    sources, (documents,) = write([1.0])
    owner = {token: d for d, document in enumerate(documents) for token in document}
    data = training(sources, 1, 16, steps=100, megatron=True)
    tokens, _, positions = data.read(0, 100, with_positions=True)
    assert positions is not None and positions.shape == tokens.shape
    for row, places in zip(tokens.tolist(), positions.tolist(), strict=True):
        expected = [0]
        for before, token in pairwise(row):
            goes_on = token == before + 1 and owner[token] == owner[before]
            expected.append(expected[-1] + 1 if goes_on else 0)
        assert places == expected


def test_counts_of_sources_at_any_sample(write: Callable[..., Written], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagap.data.megatron.COUNTED_EVERY", 8)
    sources, _ = write([0.7, 0.3])
    data = training(sources, 1, 5, steps=100, megatron=True)
    drawn = data.source_indices(0, 100).tolist()
    assert [data.drawn(n) for n in range(101)] == [[drawn[:n].count(0), drawn[:n].count(1)] for n in range(101)]


def test_provenance_names_the_documents(write: Callable[..., Written]) -> None:
    sources, contents = write([0.7, 0.3])
    data = training(sources, 1, 5, steps=100, megatron=True)
    for n in range(100):
        sample = data.sample(n)
        documents = contents[data.names.index(sample.source)]
        holders = [next(d for d, document in enumerate(documents) if t in document) for t in sample.tokens]
        assert sample.documents == list(dict.fromkeys(holders))


@pytest.mark.parametrize("weights", [[1.0], [0.3, 0.7], TWELVE], ids=["1", "2", "12"])
@pytest.mark.parametrize(("seed", "length"), [(0, 5), (1234, 16)])
@pytest.mark.filterwarnings("ignore")
def test_megatron_order_equals_megatron_core(
    write: Callable[..., Written],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    weights: list[float],
    seed: int,
    length: int,
) -> None:
    core = megatron_core()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    request.addfinalizer(torch.distributed.destroy_process_group)
    sources, contents = write(weights)
    epoch = (sum(map(len, contents[0])) - 1) // length
    for epochs in (0.3, 1.5, 1.79, 1.85, 3.2):
        samples = max(1, int(epochs * epoch / weights[0]))
        theirs = core_samples(core, sources, weights, samples, length, seed, tmp_path / f"cache{epochs}")
        assert ours(sources, samples, length, seed, "90,5,5") == theirs, epochs


def megatron_core() -> types.SimpleNamespace:
    """Its parts; the test is skipped if it is not installed (``pip install --no-deps megatron-core``)."""
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    names = ("blended_megatron_dataset_builder", "gpt_dataset", "indexed_dataset", "utils")
    try:
        parts = {name: importlib.import_module(f"megatron.core.datasets.{name}") for name in names}
    except ImportError as error:
        pytest.skip(f"megatron-core cannot be imported here: {error}")
    return types.SimpleNamespace(**parts)


class _Tokenizer:
    """As much of one as the data sets need."""

    eod = pad = 10**6
    vocab_size = 10**6 + 1
    unique_identifiers: dict[str, Any] = {"class": "none"}  # noqa: RUF012


def core_samples(
    core: types.SimpleNamespace,
    sources: list[Source],
    weights: list[float],
    samples: int,
    length: int,
    seed: int,
    cache: Path,
) -> list[list[int]]:
    prefixes = [source.prefixes[0] for source in sources]
    config = core.gpt_dataset.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=length,
        blend=(prefixes, None if len(prefixes) == 1 else weights),
        split="90,5,5",
        path_to_cache=str(cache),
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    built = core.blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder(
        core.gpt_dataset.GPTDataset, [samples, 0, 0], lambda: True, config
    ).build()
    rows = [built[0][i] for i in range(samples)]
    return [[*row["tokens"].tolist(), int(row["labels"][-1])] for row in rows]
