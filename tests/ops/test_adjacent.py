import pytest
import torch

from megagap.ops.adjacent import as_one


def test_neighbours_in_memory_are_their_concatenation_without_a_copy():
    whole = torch.arange(24.0).view(2, 3, 4)
    for dim, sizes in ((0, [1, 1]), (1, [2, 1]), (2, [1, 2, 1])):
        parts = whole.split(sizes, dim)
        found = as_one(parts, dim)
        assert found is not None and torch.equal(found, torch.cat(parts, dim))
        assert found.data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_apart_or_in_another_order_is_not_one(device):
    whole = torch.empty(6, 4, device=device)
    first, second, third = whole.split(2, 0)
    assert as_one([first, second], 0) is not None
    for parts in ([second, first], [first, third], [first, second.clone()], [first, second.t().contiguous().t()]):
        assert as_one(parts, 0) is None
