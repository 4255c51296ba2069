"""Tensors without storage behave as on the device that they pretend to be on."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megagap.ops import attention, compiled
from megagap.ops.arithmetic import deterministic_kernels
from megagap.planning.devices import load_device
from megagap.planning.pretend import PinnedMemory, pretending
from megagap.planning.recording import Recorder

CUDA = torch.device("cuda", 0)


class On:
    """A pretended device with everything recorded."""

    def __init__(self, key: str = "h100") -> None:
        self.device, pinned = load_device(key), PinnedMemory()
        self.recorder = Recorder(self.device.kind != "cpu", pinned)
        self.recorder.is_recording = True
        self.pretence = pretending(self.device, pinned, self.recorder.host_sync)

    def run(self, function: Callable[[], object]) -> object:
        with self.pretence, self.recorder:
            return function()

    @property
    def waits(self) -> int:
        return len(self.recorder.host_syncs)


def on_device(*shape: int) -> Tensor:
    return torch.zeros(shape, device=CUDA)


@pytest.mark.parametrize(("deterministic", "kernel"), [(False, "cudnn"), (True, "flash")])
def test_attention_that_must_repeat_is_not_cudnns(deterministic: bool, kernel: str):
    def attend() -> None:
        q, k, v = (torch.zeros(1, 256, heads, 64, device=CUDA, dtype=torch.bfloat16) for heads in (4, 2, 2))
        attention(q, k, v)

    on = On()
    with deterministic_kernels(deterministic):
        on.run(attend)
    assert any(kernel in operation.name for operation in on.recorder.operations)


def copied_to_pinned(blocking: bool) -> Callable[[], object]:
    return lambda: torch.empty(4, pin_memory=True).copy_(on_device(4), non_blocking=not blocking)


@pytest.mark.parametrize(
    ("wait", "count"),
    [
        (lambda: on_device().item(), 1),
        (lambda: float(on_device()), 1),
        (lambda: int(on_device()), 1),
        (lambda: bool(on_device()), 1),
        (lambda: on_device(2).tolist(), 1),
        (lambda: on_device(2).cpu(), 1),
        (lambda: on_device(2).to("cpu"), 1),
        (lambda: on_device(2).to(torch.device("cpu"), non_blocking=True), 1),
        (lambda: on_device(2).nonzero(), 1),
        (lambda: torch.masked_select(on_device(2, 3), on_device(3) > 0), 1),
        (lambda: on_device(4)[on_device(4) > 0], 1),
        (lambda: on_device(4, 2)[:, on_device(2) > 0], 1),
        (lambda: torch.cuda.synchronize(), 1),
        (lambda: torch.cuda.Event().synchronize(), 1),
        (lambda: torch.cuda.current_stream().synchronize(), 1),
        (lambda: torch.empty(4).copy_(on_device(4), non_blocking=True), 1),
        (copied_to_pinned(blocking=True), 1),
        (lambda: torch.ones(4).to(CUDA), 1),
        (lambda: torch.ones(4).to("cuda", non_blocking=True), 1),
        (lambda: torch.tensor([1.0, 2.0], device="cuda"), 1),
        (lambda: torch.as_tensor([1.0, 2.0], device=CUDA), 1),
        (lambda: on_device(2).new_tensor([1.0, 2.0]), 1),
        (copied_to_pinned(blocking=False), 0),
        (lambda: torch.ones(4).pin_memory().to(CUDA, non_blocking=True), 0),
        (lambda: on_device(4).where(on_device(4) > 0, 0.0), 0),
        (lambda: (on_device(4).sum() / 2).clamp(min=1), 0),
        (lambda: torch.cuda.Event().record(), 0),
        (lambda: torch.ones(4).sum().item(), 0),
    ],
)
def test_what_makes_the_host_wait_is_counted(wait, count):
    on = On()
    on.run(wait)
    assert on.waits == count


def test_tensors_are_where_they_pretend_to_be():
    def look() -> None:
        for x in (on_device(3), torch.ones(3).to("cuda:0"), torch.ones(3).cuda(), on_device(3).new_empty(2)):
            assert x.is_cuda and x.device == CUDA and x.get_device() == 0 and not x.is_cpu
        here = torch.ones(3)
        assert here.device == torch.device("cpu") and not here.is_cuda

    On().run(look)


def test_on_cpu_everything_is_without_storage_and_nothing_waits():
    def look() -> None:
        x = torch.ones(10**12)  # more than this machine has
        assert x.device == torch.device("cpu") and not x.is_cuda
        assert x.sum().item() == 1

    on = On("cpu")
    on.run(look)
    assert on.waits == 0


def test_backward_functions_of_ours_see_the_device_too():
    seen = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            seen.append(grad.is_cuda)
            return grad * 2

    def differentiate() -> None:
        x = on_device(3).requires_grad_()
        Function.apply(x).sum().backward()
        torch.autograd.backward(Function.apply(x).sum())
        torch.autograd.grad(Function.apply(x).sum(), x)

    On().run(differentiate)
    assert seen == [True, True, True]


def test_values_that_were_moved_from_the_host_can_be_read():
    on = On()
    assert on.run(lambda: torch.tensor([3, 5]).to(CUDA).tolist()) == [3, 5]
    assert on.waits == 2  # there without pinned memory, and back


def test_memory_is_what_lives():
    on = On()

    def allocate() -> None:
        keep = on_device(1000)
        dropped = on_device(5000)
        del dropped
        view = keep[:10]
        assert view.shape == (10,)
        assert on.recorder.memory.live == 4000 and on.recorder.memory.peak == 24000

    on.run(allocate)
    assert on.recorder.memory.live == 0


def test_views_and_empty_tensors_cost_nothing_and_the_rest_its_traffic():
    on = On()

    def compute() -> None:
        x = torch.empty(100, 10, device="cuda")
        x.view(1000).expand(3, 1000).transpose(0, 1)[2:]
        y = x * 2
        x.copy_(y)
        x.zero_()
        x.add_(y)
        torch.cat([x, y])

    on.run(compute)
    assert [(x.name, x.kernels, x.bytes) for x in on.recorder.operations] == [
        ("mul", 1, 8000),
        ("copy_", 1, 8000),
        ("zero_", 1, 4000),
        ("add_", 1, 12000),
        ("cat", 1, 16000),
    ]


@pytest.mark.skipif(not compiled.AVAILABLE, reason="the kernels are not built")
def test_kernels_are_chosen_as_if_they_were_built_for_gpus():
    assert On().run(lambda: compiled.supports(on_device(3)))
    assert On("cpu").run(lambda: compiled.supports(torch.ones(3)))
