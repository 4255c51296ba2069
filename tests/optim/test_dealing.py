"""Matrices are dealt so that each is whole on one rank, and ranks have equal work."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagap.ops.orthogonal import orthogonalising_flops
from megagap.optim.buckets import Kind, arrange
from megagap.optim.dealing import Grid, deal
from megagap.parallel.shard import Shard, split, whole

MATRIX, OTHER = Kind(True, None, False, True), Kind(True, None, False)


def layer(number: int, hidden: int, inner: int, keys: int, tp: int = 1) -> list[Shard]:
    """Matrices of a Llama's layer as tensor-parallel rank 0 has them, and a norm."""
    name = f"model.layers.{number}"
    rows = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "gate": (inner, hidden)}
    columns = {"o": (hidden, hidden), "down": (hidden, inner)}
    return [
        whole(f"{name}.norm.weight", (hidden,)),
        *(split(f"{name}.{key}.weight", shape, 0, 0, tp) for key, shape in rows.items()),
        *(split(f"{name}.{key}.weight", shape, 1, 0, tp) for key, shape in columns.items()),
    ]


def dealt(shards: list[Shard], ranks: Grid, bucket_elements: int, cuts: bool = True):
    kinds = [MATRIX if shard.is_layer_matrix else OTHER for shard in shards]
    sizes = [(kind, shard.numel) for kind, shard in zip(kinds, shards, strict=True)]
    arrangement = arrange(sizes, ranks.shard, bucket_elements, cuts=cuts)
    return arrangement, deal(shards, arrangement, ranks, bucket_elements, orthogonalising_flops)


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 50, 1_000, 10**6]),
    st.booleans(),
)
def test_each_matrix_is_updated_once_from_pieces_that_are_all_of_its_part(replicate, shard, tp, bucket_elements, cuts):
    shards = [whole("model.embed_tokens.weight", (11, 16))]
    shards += [each for number in range(3) for each in layer(number, 16, 24, 8, tp)]
    arrangement, rounds = dealt(shards, Grid(replicate, shard, tp), bucket_elements, cuts)
    matrices = [matrix for round_ in rounds for matrix in round_.matrices]
    assert sorted(m.number for m in matrices) == [n for n, each in enumerate(shards) if each.is_layer_matrix]
    order = [bucket for round_ in rounds for bucket in round_.buckets]
    expected = [n for n, bucket in enumerate(arrangement.buckets) if bucket.kind.is_matrix]
    assert order == expected[::-1]  # as the forward pass uses them
    for round_ in rounds:
        for matrix in round_.matrices:
            end = 0
            for piece in matrix.pieces:
                assert piece.matrix == matrix.number and piece.bucket in round_.buckets and piece.start == end
                bucket = arrangement.buckets[piece.bucket]
                length = (bucket.stop - bucket.start) // shard
                assert piece.first >= 0 and piece.first + piece.size <= length
                place = bucket.start + piece.rank * length + piece.first
                assert place == arrangement.starts[piece.matrix] + piece.start
                end += piece.size
            assert end == shards[matrix.number].numel == matrix.parts[0].size
            assert len(matrix.parts) * end == shards[matrix.number].shape[0] * shards[matrix.number].shape[1]


@pytest.mark.parametrize(("ranks", "slack"), [(Grid(1, 8, 1), 1.12), (Grid(2, 4, 2), 1.01), (Grid(1, 1, 8), 1.06)])
def test_ranks_have_about_as_much_work(ranks, slack):
    """Gaperon 1B; with 8 ranks each has six of the largest matrices, which are 93 % of the work."""
    shards = [each for number in range(16) for each in layer(number, 2048, 8192, 512, ranks.tp)]
    _, rounds = dealt(shards, ranks, 25_000_000)
    loads: Counter[Grid] = Counter()
    for round_ in rounds:
        for matrix in round_.matrices:
            loads[matrix.worker] += orthogonalising_flops(*shards[matrix.number].shape)
    assert len(loads) == ranks.ranks
    assert max(loads.values()) < slack * sum(loads.values()) / ranks.ranks


def test_a_round_has_about_a_bucket_for_each_rank_and_no_part_of_a_matrix():
    shards = [each for number in range(8) for each in layer(number, 2048, 8192, 512)]
    for data in (1, 4):
        _, rounds = dealt(shards, Grid(1, data, 1), 25_000_000)
        sizes = [sum(shards[m.number].numel for m in round_.matrices) for round_ in rounds]
        assert all(data * 25_000_000 <= size < (data + 2) * 25_000_000 for size in sizes[:-1])
