import math

import pytest
import torch

from megagap.ops import attention


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("queries", [1, 7])
def test_attention_equals_the_formula_in_float64(heads, queries):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, heads[0], 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 7, heads[1], 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mixed = attention(q, k, v)
    for head in range(heads[0]):
        shared = head * heads[1] // heads[0]
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / math.sqrt(8)
        hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)[-queries:]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        torch.testing.assert_close(mixed[:, :, head], weights @ v[:, :, shared])
