"""Matrices are dealt so that each is whole on one rank, and ranks have equal work."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagap.optim.buckets import Kind, arrange
from megagap.optim.gradient_store import GradientStore
from megagap.optim.matrix_updates import matrix_rounds, rounds_of
from megagap.parallel.layout import Layout
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import ShardedParameter, split, whole

MATRIX, OTHER = Kind(True, None, False, True), Kind(True, None, False)


@given(
    st.lists(st.tuples(st.sampled_from([MATRIX, MATRIX, OTHER]), st.integers(1, 900)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from([1, 50, 400, 10**6]),
    st.integers(1, 2_000),
    st.booleans(),
)
def test_rounds_have_whole_matrices_in_the_order_of_their_use(parameters, ranks, bucket_elements, elements, cuts):
    arrangement = arrange(parameters, ranks, bucket_elements, cuts=cuts)
    rounds = list(rounds_of(arrangement, elements))
    matrices = [n for n, bucket in enumerate(arrangement.buckets) if bucket.kind == MATRIX]
    assert [n for numbers in rounds for n in numbers] == matrices[::-1]
    seen = [{p for n in numbers for p in arrangement.buckets[n].parameters} for numbers in rounds]
    assert sum(map(len, seen)) == len(set().union(*seen)) == sum(kind == MATRIX for kind, _ in parameters)
    sizes = [sum(arrangement.buckets[n].stop - arrangement.buckets[n].start for n in numbers) for numbers in rounds]
    assert all(size >= elements for size in sizes[:-1])


def layers(count: int, hidden: int, inner: int, keys: int, tp: int) -> list[ShardedParameter]:
    """Matrices of a Llama's layers as tensor-parallel rank 0 has them, without storage."""
    rows = {
        "q": (hidden, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "gate": (inner, hidden),
        "up": (inner, hidden),
    }
    columns = {"o": (hidden, hidden), "down": (hidden, inner)}
    shards = [
        split(f"model.layers.{number}.{name}.weight", shape, dim, 0, tp)
        for number in range(count)
        for dim, shapes in enumerate((rows, columns))
        for name, shape in shapes.items()
    ]
    shards.append(whole("lm_head.weight", (100, hidden)))
    return [ShardedParameter(shard, torch.device("meta"), torch.float32) for shard in shards]


@pytest.mark.parametrize(
    ("data", "replicate", "tp", "slack"), [(8, 1, 1, 1.12), (8, 2, 2, 1.2), (1, 1, 8, 1.06), (32, 1, 1, 1.3)]
)
def test_ranks_have_about_as_much_work(data, replicate, tp, slack):
    """Gaperon 1B, whose 48 largest matrices are 93 % of the work."""
    layout = Layout(data * tp, tp=tp, dp_replicate=replicate)
    mesh = Mesh.without_groups(layout, 0, torch.device("meta"))
    store = GradientStore(layers(16, 2048, 8192, 512, tp), mesh, torch.float32, matrices_apart=True)
    loads: Counter[object] = Counter()
    rounds = list(matrix_rounds(store, 25_000_000))
    for round_ in rounds:
        for shard, worker in round_.workers.items():
            shorter, longer = sorted(shard.shape)
            loads[worker] += 4 * shorter**2 * longer + 2 * shorter**3
    names = [shard.name for round_ in rounds for shard in round_.workers]
    assert len(names) == len(set(names)) == 7 * 16
    assert len(loads) == data * tp
    assert max(loads.values()) < slack * sum(loads.values()) / (data * tp)
