"""The arrangement of parameters in buckets, for any number of ranks."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from megagap.optim.buckets import ALIGNMENT, Kind, arrange

KINDS = [Kind(True, None, False), Kind(False, None, False), Kind(True, "tp", True)]

PARAMETERS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 5000)), min_size=1, max_size=30)
RANKS = st.integers(1, 9)
ELEMENTS = st.integers(1, 6000)


@given(PARAMETERS, RANKS, ELEMENTS)
def test_the_buckets_of_a_kind_cover_its_buffer_without_gaps_or_overlaps(parameters, ranks, elements):
    found = arrange(parameters, ranks, elements)
    for kind in {kind for kind, _ in parameters}:
        ranges = sorted((bucket.start, bucket.stop) for bucket in found.buckets if bucket.kind == kind)
        assert [0, *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), found.buffer_elements(kind)]


@given(PARAMETERS, RANKS, ELEMENTS)
def test_parameters_are_aligned_do_not_overlap_and_are_named_by_the_buckets_that_hold_them(parameters, ranks, elements):
    found = arrange(parameters, ranks, elements)
    held: dict[int, int] = {}
    for bucket in found.buckets:
        for number in bucket.parameters:
            kind, size = parameters[number]
            start, stop = found.starts[number], found.starts[number] + size
            assert kind == bucket.kind
            held[number] = held.get(number, 0) + min(stop, bucket.stop) - max(start, bucket.start)
    assert held == {number: size for number, (_, size) in enumerate(parameters)}
    assert all(start % ALIGNMENT == 0 for start in found.starts)
    for kind in KINDS:
        places = sorted((found.starts[n], size) for n, (k, size) in enumerate(parameters) if k == kind)
        assert all(a + size <= b for (a, size), (b, _) in pairwise(places))


@given(PARAMETERS, RANKS, ELEMENTS)
def test_every_rank_owns_an_equal_aligned_slice_of_every_bucket(parameters, ranks, elements):
    for bucket in arrange(parameters, ranks, elements).buckets:
        assert (bucket.stop - bucket.start) % (ranks * ALIGNMENT) == 0


@given(PARAMETERS, RANKS, ELEMENTS)
@example([(KINDS[1], 256), (KINDS[0], 1), (KINDS[1], 193)], 1, 194)  # a large parameter cut where it begins
def test_buckets_follow_the_order_in_which_backward_completes_them(parameters, ranks, elements):
    """A bucket is complete when the first-used of its parameters is."""
    first_used = [min(bucket.parameters) for bucket in arrange(parameters, ranks, elements).buckets]
    assert first_used == sorted(first_used, reverse=True)


@given(st.integers(1, 20_000), RANKS, st.integers(1, 2000))
def test_a_large_parameter_is_cut(size, ranks, elements):
    unit = ranks * ALIGNMENT
    longest = max(bucket.stop - bucket.start for bucket in arrange([(KINDS[0], size)], ranks, elements).buckets)
    assert longest < 2 * (elements + unit) + unit


def test_a_model_of_ordinary_shape_has_buckets_of_about_the_size_asked_for():
    """An embedding of 1 GB is cut into pieces; layers are joined."""
    parameters = [(KINDS[0], 262_668_288), *[(KINDS[0], 60_817_408 // 7)] * 7 * 16]
    sizes = [bucket.stop - bucket.start for bucket in arrange(parameters, 8).buckets]
    assert len(sizes) > 30 and all(24_000_000 < size < 51_000_000 for size in sizes)


BLOCKS = st.lists(st.booleans(), min_size=30, max_size=30)


@given(PARAMETERS, RANKS, ELEMENTS, BLOCKS, st.booleans())
def test_a_bucket_has_parameters_of_one_block_only(parameters, ranks, elements, borders, cuts):
    blocks = [sum(borders[: n + 1]) for n in range(len(parameters))]
    found = arrange(parameters, ranks, elements, cuts=cuts, blocks=blocks)
    assert all(len({blocks[n] for n in bucket.parameters}) == 1 for bucket in found.buckets)
    assert {n for bucket in found.buckets for n in bucket.parameters} == set(range(len(parameters)))


PACKS = st.lists(st.sampled_from([None, None, "a", "b"]), min_size=30, max_size=30)


@given(PARAMETERS, RANKS, ELEMENTS, PACKS, st.booleans())
def test_a_pack_lies_end_to_end_in_its_order_and_without_cuts_in_one_bucket(parameters, ranks, elements, packs, cuts):
    parameters = [(KINDS[0] if pack else kind, size) for (kind, size), pack in zip(parameters, packs, strict=False)]
    found = arrange(parameters, ranks, elements, cuts=cuts, packs=packs[: len(parameters)])
    assert {n for bucket in found.buckets for n in bucket.parameters} == set(range(len(parameters)))
    for pack in ("a", "b"):
        members = [n for n, other in enumerate(packs[: len(parameters)]) if other == pack]
        if cuts or sum(parameters[n][1] for n in members) <= elements:
            assert all(found.starts[a] + parameters[a][1] == found.starts[b] for a, b in pairwise(members))
            holders = [bucket for bucket in found.buckets if set(bucket.parameters) & set(members)]
            assert cuts or len(holders) <= 1
        else:  # too large for one bucket: as if it were none
            assert all(found.starts[n] % ALIGNMENT == 0 for n in members)


@given(PARAMETERS, RANKS, ELEMENTS)
def test_without_cuts_a_parameter_is_in_one_bucket(parameters, ranks, elements):
    buckets = arrange(parameters, ranks, elements, cuts=False).buckets
    assert sorted(n for bucket in buckets for n in bucket.parameters) == list(range(len(parameters)))
