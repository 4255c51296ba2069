"""Every layer is computed once, in the order of the model, wherever a placement puts it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagap.parallel.placement import Place, Placement, balance_layers, spread_layers

counts = st.lists(st.integers(0, 4), min_size=1, max_size=6).map(lambda counts: [*counts, *counts])
placements = st.one_of(
    counts.map(Placement.loop),
    counts.map(lambda counts: Placement.loop(counts, chunks=2)),
    counts.map(Placement.v_shape),
)


@given(placements)
def test_the_ranks_together_compute_every_layer_once_and_each_knows_where(placement: Placement):
    everything = [stage for rank in range(placement.ranks) for stage in placement.stages_of(rank)]
    assert sorted(everything, key=lambda stage: stage.index) == list(placement.stages)
    layers = [layer for stage in placement.stages for layer in stage.layers]
    assert layers == list(range(len(layers)))
    for index, (rank, chunk) in enumerate(placement.places):
        assert placement.virtual(rank, chunk) == index
        assert placement.stages_of(rank)[chunk].index == index


@given(placements)
def test_one_virtual_stage_has_the_embedding_and_one_the_head(placement: Placement):
    assert [stage.index for stage in placement.stages if stage.has_embedding] == [0]
    assert [stage.index for stage in placement.stages if stage.has_head] == [len(placement.stages) - 1]


def test_with_one_chunk_per_rank_rank_and_virtual_stage_have_the_same_number():
    placement = Placement.loop([2, 1, 1])
    assert placement.places == (Place(0, 0), Place(1, 0), Place(2, 0))
    assert [stage.layers for stage in placement.stages] == [range(2), range(2, 3), range(3, 4)]


def test_a_loop_goes_around_the_ranks_once_per_chunk():
    assert Placement.loop([1] * 4, chunks=2).places == (Place(0, 0), Place(1, 0), Place(0, 1), Place(1, 1))


def test_a_v_goes_down_the_ranks_and_back():
    placement = Placement.v_shape([1] * 6)
    assert [[stage.index for stage in placement.stages_of(rank)] for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize(
    ("placement", "ranks"),
    [
        (Placement.loop([3]), (0,)),
        (Placement.loop([1, 1, 1]), (0, 2)),
        (Placement.loop([1] * 6, chunks=2), (0, 2)),
        (Placement.v_shape([1] * 6), (0,)),
    ],
)
def test_a_tied_embedding_is_where_the_first_and_the_last_virtual_stage_are(placement: Placement, ranks):
    assert placement.embedding_ranks == ranks


def test_a_placement_that_leaves_a_chunk_without_a_virtual_stage_is_refused():
    stages = Placement.loop([1, 1]).stages
    with pytest.raises(AssertionError, match="not one virtual stage for each chunk"):
        Placement(stages, (Place(0, 0), Place(0, 0)))


def test_layers_are_spread_evenly_earlier_stages_first():
    assert spread_layers(7, 3) == [3, 2, 2]
    assert spread_layers(6, 3) == [2, 2, 2]


@given(st.integers(1, 8), st.integers(0, 30), st.floats(0, 12))
def test_balanced_layers_make_the_slowest_stage_as_fast_as_any_division_does(stages, more, head):
    """By trying every number of layers of the last stage, the others being spread evenly."""
    layers = max(stages - 2, 0) + more
    counts = balance_layers(layers, stages, head)
    assert sum(counts) == layers and all(counts[1:-1])

    def slowest(counts: list[int]) -> float:
        return max(*counts, counts[-1] + head)

    possible = [[*spread_layers(layers - last, stages - 1), last] for last in range(layers + 1)] if stages > 1 else []
    valid = [other for other in possible if all(other[1:-1])]
    assert slowest(counts) <= min(map(slowest, valid), default=layers + head)


def test_a_large_head_takes_layers_from_the_last_stage():
    assert balance_layers(8, 2, 0.0) == [4, 4]
    assert balance_layers(8, 2, 2.0) == [5, 3]
    assert balance_layers(8, 4, 5.0) == [3, 3, 2, 0]
