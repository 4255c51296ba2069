"""Documents packed into sequences are computed as if each were separate."""

import pytest
import torch

from megagap.model.init import initialise
from megagap.model.llama import LlamaStage, build_whole
from megagap.ops import document_mask as documents_module
from megagap.ops.document_mask import Documents, document_attention
from megagap.training.step import targets_of
from tests.models import tiny_model

LENGTHS = [[5, 1, 9, 1], [16], [1, 15]]
"""Lengths of the documents in each of three sequences of 16 tokens."""


def positions(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


@pytest.fixture
def stage() -> LlamaStage:
    model = tiny_model()
    stage = build_whole(model)
    initialise(stage.sharded_parameters(), model, 3)
    return stage


def losses(stage: LlamaStage, tokens: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Of each input of [b, s + 1] tokens, and gradients in the parameters of their sum."""
    documents = None if places is None else Documents.of(places[:, :-1])
    y = stage(tokens[:, :-1], tokens.shape[1] - 1, documents=documents)
    total, each, _ = stage.loss(y, targets_of(tokens, places), torch.ones(()))
    total.backward()
    return each


@pytest.mark.parametrize("masked", [False, True], ids=["one by one", "by a mask, as on a GPU"])
def test_packed_and_separate_documents_have_the_same_losses_and_gradients(
    stage: LlamaStage, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    if masked:
        monkeypatch.setattr(documents_module, "document_attention", attention_by_mask)
        monkeypatch.setattr("megagap.model.attention.document_attention", attention_by_mask)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (3, 17), generator=generator)
    lengths = [[*row, 1] for row in LENGTHS]  # the last target begins a document of its own
    packed = losses(stage, tokens, positions(lengths))
    gradients = [parameter.grad.clone() for parameter in stage.parameters()]
    stage.zero_grad()
    for row, sizes in enumerate(LENGTHS):
        at = 0
        for size in sizes:
            own = tokens[row, at : at + size]
            if size > 1:
                alone = losses(stage, own[None], None)
                torch.testing.assert_close(packed[row, at : at + size - 1], alone[0], rtol=1e-5, atol=1e-5)
            assert packed[row, at + size - 1] == 0  # the last token of a document predicts nothing
            at += size
    for ours, parameter in zip(gradients, stage.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def attention_by_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, *, keep_scores: bool
) -> torch.Tensor:
    return documents_module.masked_attention(q, k, v, documents.positions)


def test_a_sequence_of_one_document_is_computed_as_without_a_mask(stage: LlamaStage) -> None:
    tokens = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))
    with_mask = losses(stage, tokens, torch.arange(17).expand(2, 17))
    torch.testing.assert_close(with_mask, losses(stage, tokens, None))


def test_positions_count_from_the_start_of_each_document(stage: LlamaStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no loss shows: rotary attention depends on distances only."""
    given = []

    def rotary(q: torch.Tensor, k: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given.append(tables[2])
        return q, k

    monkeypatch.setattr("megagap.model.attention.rotary", rotary)
    stage(torch.zeros(3, 16, dtype=torch.int64), 16, documents=Documents.of(positions(LENGTHS)))
    assert len(given) == 2 and all(torch.equal(places, positions(LENGTHS)) for places in given)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_attention_stays_within_documents(heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 16, heads[0], 8, generator=generator)
    k, v = (torch.randn(3, 16, heads[1], 8, generator=generator) for _ in range(2))
    documents = Documents.of(positions(LENGTHS))
    assert documents.borders.tolist() == [0, 5, 6, 15, 16, 32, 33, 48] and documents.longest == 16
    one_by_one = document_attention(q, k, v, documents)
    masked = documents_module.masked_attention(q, k, v, documents.positions)
    torch.testing.assert_close(one_by_one, masked)
    k[0, :5] += 100
    again = document_attention(q, k, v, documents)
    assert not torch.equal(again[0, :5], one_by_one[0, :5]) and torch.equal(again[0, 5:], one_by_one[0, 5:])
