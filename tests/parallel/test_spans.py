"""A process's spans say at any time what it is doing."""

from contextlib import suppress

from megagap.parallel.spans import Spans


def described(spans):
    return [str(span) for span in spans.open]


def test_what_is_open_is_what_goes_on_the_outermost_first():
    spans = Spans()
    with spans.span("step"):
        with spans.span("forward", microbatch=3, chunk=0), spans.collective("all-reduce", "tp"):
            assert described(spans) == ["step", "forward of microbatch 3, chunk 0", "all-reduce over tp (number 1)"]
            assert [span.waits for span in spans.open] == [False, False, True]
        with spans.wait("wait", peer=5):
            assert described(spans) == ["step", "wait for rank 5"]
    assert not spans.open


def test_a_block_that_raises_has_ended():
    spans = Spans()
    with suppress(ValueError), spans.span("step"):
        raise ValueError
    assert not spans.open


def test_each_axis_numbers_its_collectives_as_they_begin_and_anything_counts_as_a_move():
    spans = Spans()
    first, second = (spans.collective("all-gather", "dp") for _ in range(2))
    with spans.collective("all-reduce", "world"), second:
        assert [span.number for span in spans.open] == [1, 2]
    assert first.number == 1 and spans.collectives == {"dp": 2, "world": 1}
    seen = [spans.moves]
    for act in (spans.move, spans.span("x").__enter__, lambda: spans.collective("all-gather", "dp")):
        act()
        seen.append(spans.moves)
    assert len(set(seen)) == 4
