"""Batches of data-parallel ranks, and reading ahead."""

import pytest
import torch

from megagap.data.loader import MicrobatchLoader
from megagap.data.sources import Source
from tests.data.few import S, training


@pytest.mark.parametrize(("dp", "micro"), [(1, 12), (2, 3), (4, 1), (6, 2)])
def test_every_layout_sees_the_same_batch(sources: list[Source], dp: int, micro: int) -> None:
    data = training(sources, seed=5)
    parts = [MicrobatchLoader(data, 12, micro, rank, dp).step(24) for rank in range(dp)]
    for part in parts:
        assert part.tokens.dtype == torch.int64
        assert part.tokens.shape == (12 // dp // micro, micro, S + 1)
    assert torch.cat([part.tokens for part in parts]).view(12, S + 1).tolist() == data.batch(24, 12).tolist()
    assert torch.cat([part.sources for part in parts]).view(12).tolist() == data.source_indices(24, 12).tolist()
