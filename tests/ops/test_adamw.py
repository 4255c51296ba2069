import pytest
import torch

from megagap.ops import adamw_, compiled
from megagap.ops.random_bits import Segment
from megagap.ops.remainder import join, split_
from tests.ops.test_remainder import all_kinds_of_numbers

needs_kernels = pytest.mark.skipif(not compiled.AVAILABLE, reason="the compiled kernels were not built")
NUMBERS = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def update(state, grad, *, divisor=1.0, reject=0.0, lr=1e-2, stochastic=None, remainder=None):
    parameter, first, second, updates = state
    updates += 1 - reject
    adamw_(
        parameter, first, second, grad,
        divisor=torch.tensor(divisor), reject=torch.tensor(reject), updates=updates,
        lr=lr, stochastic=stochastic, remainder=remainder, **NUMBERS,
    )  # fmt: skip


def segment(size, seed=3, name="weight"):
    """A whole parameter that is alone in its buffer."""
    return Segment.of(seed, name, (size,), (0,), (size,), first=0, begin=0, end=size)


def fresh(parameter, moments=torch.float32):
    zeros = torch.zeros(parameter.shape, dtype=moments)
    return parameter.clone(), zeros.clone(), zeros.clone(), torch.zeros(())


@pytest.mark.parametrize("size", [1, 16, 1003])
def test_updates_equal_torch_adamw_on_divided_gradients(size):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator)
    state, theirs = fresh(start), torch.nn.Parameter(start.double())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, **NUMBERS)
    for _ in range(5):
        grad = torch.randn(size, generator=generator)
        theirs.grad = grad.double() / 3
        optimizer.step()
        update(state, grad, divisor=3.0)
    torch.testing.assert_close(state[0].double(), theirs.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.4, 0.999)])
def test_updates_equal_torchs_fused_adamw_bit_for_bit(monkeypatch, kernels, betas):
    """Of whole vectors: what remains at the end torch computes without them, and rounds otherwise."""
    monkeypatch.setattr(compiled, "supports", lambda *tensors: kernels and compiled.AVAILABLE)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1024, generator=generator)
    numbers = NUMBERS | dict(betas=betas)
    (ours, first, second, updates), theirs = fresh(start), torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, fused=True, **numbers)
    for _ in range(50):
        theirs.grad = torch.randn(1024, generator=generator)
        grad = theirs.grad.clone()
        optimizer.step()
        updates += 1
        adamw_(
            ours, first, second, grad, divisor=torch.ones(()), reject=torch.zeros(()), updates=updates, lr=1e-2,
            **numbers,
        )  # fmt: skip
    moments = optimizer.state[theirs]
    assert torch.equal(ours, theirs)
    assert torch.equal(first, moments["exp_avg"]) and torch.equal(second, moments["exp_avg_sq"])


def test_a_rejected_update_changes_nothing():
    state = fresh(torch.randn(40))
    update(state, torch.randn(40))
    before = [part.clone() for part in state]
    update(state, torch.full((40,), float("nan")), reject=1.0)
    assert all(torch.equal(part, old) for part, old in zip(state, before, strict=True))


@needs_kernels
def test_a_bf16_parameter_is_the_fp32_update_rounded_to_the_nearest():
    start, grad = torch.randn(1003).bfloat16(), torch.randn(1003)
    half, wide = fresh(start), fresh(start.float())
    update(half, grad)
    update(wide, grad)
    assert torch.equal(half[0], wide[0].bfloat16())


@pytest.mark.parametrize("kernels", [True, False])
def test_all_in_bf16_rounded_to_the_nearest_equals_torch_adamw_in_bf16(monkeypatch, kernels):
    """Which Gaperon was trained with."""
    monkeypatch.setattr(compiled, "supports", lambda *tensors: kernels and compiled.AVAILABLE)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1003, generator=generator).bfloat16()
    state, theirs = fresh(start, torch.bfloat16), torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, fused=True, **NUMBERS)
    for _ in range(5):
        theirs.grad = torch.randn(1003, generator=generator).bfloat16()
        update(state, theirs.grad.clone())
        optimizer.step()
    moments = optimizer.state[theirs]
    for ours, other in zip(state, (theirs, moments["exp_avg"], moments["exp_avg_sq"]), strict=False):
        # (9 m + g) / 10 is often half way between two numbers, or next to it, where fp32's own rounding decides.
        assert (ours != other).float().mean() < 0.1
        torch.testing.assert_close(ours, other.detach(), rtol=2**-6, atol=0)


@needs_kernels
def test_stochastic_rounding_goes_to_a_neighbour_and_is_unbiased():
    size, step = 200_000, 1e-3  # an eighth of the distance of bf16 numbers above 1
    state = fresh(torch.ones(size).bfloat16())
    parameter, first, second, _ = state
    one, zero = torch.ones(()), torch.zeros(())
    adamw_(
        parameter, first, second, -torch.ones(size), divisor=one, reject=zero, updates=one,
        lr=step, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, stochastic=[segment(size)],
    )  # fmt: skip
    assert set(parameter.float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    probability = step / 2**-7
    deviation = (probability * (1 - probability) / size) ** 0.5
    moved = float((parameter > 1).float().mean())
    assert abs(moved - probability) < 5 * deviation


@needs_kernels
def test_stochastic_rounding_depends_on_seed_name_step_and_element_only():
    start, grad = torch.randn(40_000).bfloat16(), torch.randn(40_000)

    def result(seed, name="weight", threads=2, earlier_updates=0):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            state = fresh(start)
            state[3].fill_(earlier_updates)
            update(state, grad.clone(), stochastic=[segment(40_000, seed, name)])
        finally:
            torch.set_num_threads(before)
        return state[0]

    first = result(1)
    assert torch.equal(first, result(1, threads=1)) and torch.equal(first, result(1, threads=3))
    for others in (result(2), result(1, "bias"), result(1, earlier_updates=1)):
        assert not torch.equal(first, others)
    nearest = fresh(start)
    update(nearest, grad.clone())
    apart = (first.view(torch.int16) - nearest[0].view(torch.int16)).abs()
    assert 0 < apart.max() <= 1


ROWS, COLUMNS = 37, 92
CUTS = {
    "by rows, unequal": ([(0, 0), (20, 0)], [(20, 92), (17, 92)]),
    "by columns": ([(0, 0), (0, 23), (0, 46), (0, 69)], [(37, 23)] * 4),
    "both ways": ([(0, 0), (0, 46), (19, 0), (19, 46)], [(19, 46), (19, 46), (18, 46), (18, 46)]),
}


@needs_kernels
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("slices", "moments"), [(1, torch.float32), (3, torch.float32), (3, torch.bfloat16)])
def test_bits_of_stochastic_rounding_are_the_same_however_the_tensor_is_cut(cut, slices, moments):
    """Over tp by rows or columns, then over data ranks, beside another parameter, at any place of a buffer."""
    whole, grad = torch.randn(ROWS, COLUMNS).bfloat16(), torch.randn(ROWS, COLUMNS)
    once = fresh(whole.flatten(), moments)
    place = Segment.of(7, "w", whole.shape, (0, 0), whole.shape, first=0, begin=0, end=whole.numel())
    update(once, grad.flatten(), stochastic=[place])
    expected = [part.view(ROWS, COLUMNS) for part in once[:3]]
    for offsets, sizes in zip(*CUTS[cut], strict=True):
        rectangle = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        values, gradients = whole[rectangle].flatten(), grad[rectangle].flatten()
        found = []
        for part in torch.arange(len(values)).chunk(slices):
            first, count, before = int(part[0]), len(part), 5 + int(part[0]) % 3
            buffer, towards = torch.full((before + count + 2,), 3.0).bfloat16(), torch.ones(before + count + 2)
            buffer[before : before + count], towards[before : before + count] = values[part], gradients[part]
            state = fresh(buffer, moments)
            segments = [
                Segment.of(7, "other", (before,), (0,), (before,), first=0, begin=0, end=before),
                Segment.of(7, "w", whole.shape, offsets, sizes, first=first, begin=before, end=before + count),
            ]
            update(state, towards, stochastic=segments)
            assert torch.equal(state[0][before + count :], buffer[before + count :])
            found.append([part[before : before + count] for part in state[:3]])
        for parts, wanted in zip(zip(*found, strict=True), expected, strict=True):
            assert torch.equal(torch.cat(parts).view(sizes), wanted[rectangle])


@needs_kernels
def test_values_that_are_not_finite_stay_so_under_stochastic_rounding():
    state = fresh(torch.tensor([float("inf"), float("-inf"), float("nan")]).bfloat16())
    update(state, torch.zeros(3), stochastic=[segment(3)])
    assert torch.equal(state[0].isnan(), torch.tensor([False, False, True])) and state[0][:2].isinf().all()


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: (s[0], s[1][:5], s[2], s[3]), "of one size"),
        (lambda s: (s[0], s[1].bfloat16(), s[2], s[3]), "moments must both be float32, or bfloat16"),
        (lambda s: (s[0], s[1].half(), s[2].half(), s[3]), "moments must both be float32, or bfloat16"),
        (lambda s: (s[0].double(), *s[1:]), "float32"),
    ],
)
def test_mismatched_buffers_are_refused(change, message):
    parameter, first, second, updates = change(fresh(torch.ones(6)))
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        torch.ops.megagap.adamw_(
            parameter, first, second, torch.ones(6), torch.ones(()), torch.zeros(()), updates + 1,
            1e-3, 0.9, 0.95, 1e-8, 0.0, None,
        )  # fmt: skip


@pytest.mark.parametrize("kernels", [True, False])
def test_a_bf16_parameter_with_a_remainder_is_updated_as_its_fp32_master_bit_for_bit(monkeypatch, kernels):
    monkeypatch.setattr(compiled, "supports", lambda *tensors: kernels and compiled.AVAILABLE)
    start = torch.randn(1003)
    wide, parts = fresh(start), fresh(start.bfloat16())
    remainder = torch.zeros(1003, dtype=torch.int16)
    split_(start, parts[0], remainder)
    for step in range(20):
        grad, rejected = torch.randn(1003), float(step == 3)
        update(wide, grad.clone(), divisor=1.5, reject=rejected)
        update(parts, grad, divisor=1.5, reject=rejected, remainder=remainder)
    assert torch.equal(join(parts[0], remainder), wide[0])
    assert all(torch.equal(mine, other) for mine, other in zip(parts[1:], wide[1:], strict=True))


@pytest.mark.parametrize("kernels", [True, False])
def test_an_update_of_nothing_keeps_every_kind_of_master(monkeypatch, kernels):
    monkeypatch.setattr(compiled, "supports", lambda *tensors: kernels and compiled.AVAILABLE)
    numbers = all_kinds_of_numbers()
    parameter, remainder = numbers.bfloat16(), torch.zeros(len(numbers), dtype=torch.int16)
    split_(numbers, parameter, remainder)
    before = parameter.clone(), remainder.clone()
    zeros = torch.zeros(len(numbers))
    adamw_(
        parameter, zeros, zeros.clone(), zeros.clone(), divisor=torch.ones(()), reject=torch.zeros(()),
        updates=torch.ones(()), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, remainder=remainder,
    )  # fmt: skip
    assert torch.equal(parameter.view(torch.int16), before[0].view(torch.int16))
    assert torch.equal(remainder, before[1])


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_moment_in_bf16_falls_as_in_fp32_on_average(monkeypatch, kernels, dtype):
    """Rounded to the nearest it would not fall at all: 0.999 is nearer to 1 than to the bf16 number below."""
    monkeypatch.setattr(compiled, "supports", lambda *tensors: kernels and compiled.AVAILABLE)
    size, updates = 20_000, 8
    parameter, remainder = torch.ones(size, dtype=dtype), torch.zeros(size, dtype=torch.int16)
    first, second = torch.full((size,), -3.0).bfloat16(), torch.ones(size).bfloat16()
    for step in range(1, 1 + updates):
        adamw_(
            parameter, first, second, torch.zeros(size), divisor=torch.ones(()), reject=torch.zeros(()),
            updates=torch.tensor(float(step)), lr=1e-3, betas=(0.999, 0.999), eps=1e-8, weight_decay=0.0,
            stochastic=[segment(size)], remainder=remainder if dtype == torch.bfloat16 else None,
        )  # fmt: skip
    for moment, start in ((first, -3.0), (second, 1.0)):
        assert moment.unique().numel() > 1
        assert moment.double().mean().item() / start == pytest.approx(0.999**updates, abs=2e-4)


@needs_kernels
def test_kernels_and_plain_torch_round_with_the_same_random_bits(monkeypatch):
    """Where both compute the same before: with gradients of 1 or -1 and no moments, weights move by lr."""
    size, lr = 5000, 2**-9
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator).bfloat16()
    signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
    place = Segment.of(2, "w", (500, 40), (3, 7), (250, 20), first=0, begin=0, end=size)
    for grad, beta in ((signs, 0.0), (torch.randn(size, generator=generator), 0.0)):
        results = []
        for kernels in (True, False):
            monkeypatch.setattr(compiled, "supports", lambda *tensors, kernels=kernels: kernels)
            state = fresh(start, torch.bfloat16)
            adamw_(
                *state[:3], grad.clone(), divisor=torch.ones(()), reject=torch.zeros(()), updates=torch.tensor(5.0),
                lr=lr, betas=(beta, beta), eps=1e-30, weight_decay=0.0, stochastic=[place],
            )  # fmt: skip
            results.append(state[:3])
        for mine, other in zip(*results, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_rejected_update_leaves_what_is_rounded_as_it_was(monkeypatch, kernels):
    monkeypatch.setattr(compiled, "supports", lambda *tensors: kernels and compiled.AVAILABLE)
    state = fresh(torch.randn(300).bfloat16(), torch.bfloat16)
    update(state, torch.randn(300), stochastic=[segment(300)])
    before = [part.clone() for part in state]
    update(state, torch.full((300,), torch.nan), reject=1.0, stochastic=[segment(300)])
    assert all(torch.equal(part, old) for part, old in zip(state, before, strict=True))
