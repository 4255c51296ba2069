"""Tensors without storage (on torch's meta device) that look as if they were on another device.

Torch builds for CPUs cannot hold a GPU's tensors, not even fake ones whose backward pass would run: autograd asks the
GPU's driver. The meta device computes shapes only, forward and backward, on the calling thread. So tensors really are
on it, but their ``device`` names the one to be examined, and code that chooses by device chooses what it would choose
there. Queries of ``torch.cuda`` are answered for that device, too.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from megagap.ops import compiled
from megagap.ops.arithmetic import is_deterministic
from megagap.ops.attention import is_hopper
from megagap.planning.devices import Device

META = torch.device("meta")

OnHostSync = Callable[[str], None]
"""Called with what made the host wait for the device."""


class PinnedMemory:
    """Which host tensors are pinned: copies between them and a GPU need not make the host wait."""

    def __init__(self) -> None:
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def add(self, tensor: Tensor) -> Tensor:
        self._storages.add(tensor.untyped_storage())
        return tensor

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage() in self._storages


class Pretence(TorchFunctionMode):
    """While active, meta tensors behave as if they were on ``device``, and tensors created there are created on meta.

    Values are unknown, and read as ones; only tensors that were moved there from real ones keep theirs.
    """

    def __init__(self, device: Device, pinned: PinnedMemory, on_host_sync: OnHostSync) -> None:
        super().__init__()
        self.device, self.pinned, self.on_host_sync = device.torch_device, pinned, on_host_sync
        self._is_gpu = self.device.type == "cuda"
        self._answers: dict[Callable[..., Any], Any] = {
            torch.Tensor.device.__get__: self.device,
            torch.Tensor.is_cuda.__get__: self._is_gpu,  # type: ignore[attr-defined]
            torch.Tensor.is_cpu.__get__: not self._is_gpu,  # type: ignore[attr-defined]
            torch.Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
            torch.Tensor.get_device: 0 if self._is_gpu else -1,
        }
        self._routes: dict[Callable[..., Any], Callable[..., Any]] = {
            torch.Tensor.tolist: self._to_list,
            torch.Tensor.numpy: lambda x: self._values(x, "numpy()").numpy(),
            torch.Tensor.pin_memory: lambda x, *_: self.pinned.add(x),
            torch.Tensor.cuda: lambda x, *_, **__: x.to(META),
            torch.Tensor.to: self._to,
            torch.Tensor.new_tensor: self._new_tensor,
            torch.tensor: self._from_host,
            torch.as_tensor: self._from_host,
            torch.asarray: self._from_host,
            F.scaled_dot_product_attention: self._attention,
        }
        self._constructors = _device_constructors()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in self._answers and args[0].is_meta:
            return self._answers[function]
        args = tuple(map(self._meta_for, args))
        if "device" in kwargs:
            kwargs["device"] = self._meta_for(_device(kwargs["device"]))
        if function in self._constructors:
            if kwargs.get("device") is None and not self._is_gpu:
                kwargs["device"] = META
            if function in self._routes:  # of values: torch.tensor and its like
                return self._routes[function](*args, maker=function, **kwargs)
            if kwargs.pop("pin_memory", False):
                return self.pinned.add(function(*args, **kwargs))
        route = self._routes.get(function)
        return function(*args, **kwargs) if route is None else route(*args, **kwargs)

    def _meta_for(self, value: object) -> object:
        return META if isinstance(value, torch.device) and value.type == self.device.type else value

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(self._meta_for(_device(value)) for value in args)
        moved = x.to(*args, **kwargs)
        if moved.is_meta and not x.is_meta:
            moved.real_values = x  # type: ignore[attr-defined]
        return moved

    def _from_host(
        self, data: Any, *args: Any, maker: Callable[..., Tensor], device: Any = None, **kwargs: Any
    ) -> Tensor:
        """Made of values on the host, and moved: on a GPU the host waits for that."""
        made = maker(data, *args, **kwargs)
        return made if device != META else self._to(made, META)

    def _new_tensor(self, x: Tensor, data: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None) or x.device
        return self._from_host(data, maker=torch.tensor, device=device, **{"dtype": x.dtype, **kwargs})

    def _values(self, x: Tensor, asked: str) -> Tensor:
        if not x.is_meta:
            return x
        if self._is_gpu:
            self.on_host_sync(asked)
        real = getattr(x, "real_values", None)
        return torch.ones(x.shape, dtype=x.dtype) if real is None else real

    def _to_list(self, x: Tensor) -> Any:
        return self._values(x, "tolist()").tolist()

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The operator that torch would choose on the device; on meta itself it takes the one with all scores."""
        given = (query, key, value)
        plain = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        if not query.is_meta:
            return F.scaled_dot_product_attention(*given, **plain)  # type: ignore[arg-type]
        aten = torch.ops.aten
        if not self._is_gpu:
            return aten._scaled_dot_product_flash_attention_for_cpu(
                *given, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        backend = _gpu_backend(query, key, attn_mask)
        if attn_mask is not None and attn_mask.dtype == torch.bool and backend != SDPBackend.MATH:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, 0.0)
        train = any(x.requires_grad for x in given)
        match backend:
            case SDPBackend.FLASH_ATTENTION:
                return aten._scaled_dot_product_flash_attention(*given, dropout_p, is_causal, scale=scale)[0]
            case SDPBackend.CUDNN_ATTENTION:
                return aten._scaled_dot_product_cudnn_attention(
                    *given, attn_mask, train, dropout_p, is_causal, scale=scale
                )[0]
            case SDPBackend.EFFICIENT_ATTENTION:
                return aten._scaled_dot_product_efficient_attention(
                    *given, attn_mask, train, dropout_p, is_causal, scale=scale
                )[0]
            case _:
                return F.scaled_dot_product_attention(*given, **plain)  # type: ignore[arg-type]


def _device(value: object) -> object:
    return torch.device(value) if isinstance(value, str) else value


def _gpu_backend(query: Tensor, key: Tensor, mask: Tensor | None) -> SDPBackend:
    """The first in torch's current order that is enabled and takes these tensors."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    head, grouped = query.shape[-1], query.shape[1] != key.shape[1]
    cuda = torch.backends.cuda
    takes = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled() and half and mask is None and head <= 256 and not head % 8,
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled() and not grouped,
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled()
        and half
        and not head % 8
        and head <= (256 if torch.cuda.get_device_capability()[0] >= 9 else 128)
        and torch.version.hip is None
        and not is_deterministic(),
    }
    order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
    return next((backend for backend in order if takes.get(backend)), SDPBackend.MATH)


class _Event:
    """Stands in for ``torch.cuda.Event``."""

    on_host_sync: OnHostSync

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.on_host_sync("Event.synchronize()")


class _Stream:
    """Stands in for ``torch.cuda.Stream``."""

    on_host_sync: OnHostSync

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> object:
        return event

    def synchronize(self) -> None:
        self.on_host_sync("Stream.synchronize()")


@contextmanager
def pretending(device: Device, pinned: PinnedMemory, on_host_sync: OnHostSync) -> Iterator[None]:
    """Inside the block all of torch and megagap behave as on ``device``, over tensors without storage."""

    def synchronize(*_: object) -> None:
        on_host_sync("torch.cuda.synchronize()")

    event = type("Event", (_Event,), {"on_host_sync": staticmethod(on_host_sync)})
    stream = type("Stream", (_Stream,), {"on_host_sync": staticmethod(on_host_sync)})
    answers: list[tuple[Any, str, object]] = []
    if device.kind != "cpu":
        answers = [
            (torch.cuda, "get_device_capability", lambda *_: device.capability),
            (torch.cuda, "get_device_name", lambda *_: device.name),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "synchronize", synchronize),
            (torch.cuda, "Event", event),
            (torch.cuda, "Stream", stream),
            (torch.cuda, "current_stream", lambda *_: stream()),
            (torch.version, "hip", "6" if device.kind == "rocm" else None),
        ]
    with ExitStack() as stack:
        for owner, name, value in answers:
            stack.enter_context(_replaced(owner, name, value))
        if device.kind != "cpu":
            stack.enter_context(compiled.as_on_gpu())
        is_hopper.cache_clear()
        stack.callback(is_hopper.cache_clear)
        pretence = Pretence(device, pinned, on_host_sync)
        # Calls of torch leave the mode, the backward pass among them, in which our own operations ask again.
        stack.enter_context(_replaced(torch.autograd, "_engine_run_backward", _within(pretence)))
        stack.enter_context(pretence)
        yield


def _within(pretence: Pretence) -> Callable[..., Any]:
    run_backward: Callable[..., Any] = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run(*args: Any, **kwargs: Any) -> Any:
        with pretence:
            return run_backward(*args, **kwargs)

    return run


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
