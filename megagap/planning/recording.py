"""What a step computes, operation by operation: shapes, FLOPs, bytes, kernels, where it was called, and live memory."""

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megagap.errors import ConfigError
from megagap.planning.pretend import PinnedMemory

_PACKAGE = f"{Path(__file__).parents[1]}/"
_HERE = f"{Path(__file__).parent}/"
_EXECUTOR = "parallel/pipeline.py"

MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}

KINDS = (
    "matrix products",
    "attention",
    "loss",
    "norms and rotary",
    "optimizer",
    "gradient accumulation",
    "copies and casts",
    "collectives",
    "other",
)
"""``norms and rotary`` has SwiGLU, too; ``other`` the embedding and small elementwise operations."""

_KIND_OF_NAME = (
    ("adam", "optimizer"),
    ("attention", "attention"),
    ("varlen", "attention"),
    ("cross_entropy", "loss"),
    ("rms_norm", "norms and rotary"),
    ("rotary", "norms and rotary"),
    ("swiglu", "norms and rotary"),
)

_KIND_OF_FILE = {
    "ops/attention.py": "attention",
    "ops/document_mask.py": "attention",
    "ops/softmax.py": "loss",
    "parallel/cross_entropy.py": "loss",
    "parallel/contrastive_loss.py": "loss",
    "ops/rms_norm.py": "norms and rotary",
    "ops/rotary.py": "norms and rotary",
    "ops/swiglu.py": "norms and rotary",
    "model/rotary.py": "norms and rotary",
    "parallel/projection_norm.py": "norms and rotary",
    "ops/adamw.py": "optimizer",
    "ops/orthogonal.py": "optimizer",
    "optim/clipping.py": "optimizer",
    "optim/distributed.py": "optimizer",
    "optim/matrix_updates.py": "optimizer",
    "optim/muon_rule.py": "optimizer",
    "ops/products.py": "gradient accumulation",
}
"""Of what is not named above: plain torch in the file of an operation belongs to it. Other products are the model's."""

_COPIES = {"copy_", "_to_copy", "clone", "contiguous", "cat", "stack", "fill_", "zero_", "zeros", "zeros_like", "full"}

_WRITES_ONLY = {"copy_", "fill_", "zero_"}
"""In-place operations that do not read what they overwrite."""

_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "_local_scalar_dense",
}

_KERNELS = {
    "embedding_dense_backward": 15,  # clears, sorts the tokens, finds their segments, adds up
    "index_put_": 9,  # sorts the ids, adds up the rows of each
    "_scaled_dot_product_cudnn_attention_backward": 3,  # dot products of output and gradient, gradients, cast of dq
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "rms_norm_backward": 2,  # the weight's gradient is added up from blocks
    "add_rms_norm_backward": 2,
    "rotary_pack": 2,  # the rotation, and the copy of the values
}
"""Kernels of one operation, where they are not one; by torch's profiler on an H100."""


@dataclass(frozen=True)
class Work:
    """The arithmetic of an operation: nothing that counts unless it is a matrix product or attention."""

    dtype: torch.dtype
    flops: int = 0
    """Of attention: counting the full matrix, without what its backward pass recomputes. 0 in a forward pass that runs
    again."""
    recomputed_flops: int = 0
    causal_flops: int = 0
    """Of attention: counting the causal half, with what is recomputed."""
    product: tuple[int, int, int] | None = None
    """Rows, columns and inner dimension of a matrix product."""
    attention: tuple[str, int, bool] | None = None
    """Kernel, head size, and whether it is the backward pass."""
    more_kernels: int = 0
    """Than the operation always has."""


@dataclass(frozen=True)
class Operation:
    """One operation as it was called."""

    kind: str
    name: str
    site: str
    """``file:line`` of the innermost line in megagap; for what autograd derives, that of the forward operation."""
    files: frozenset[str]
    """All files of megagap on the stack."""
    shapes: str
    kernels: int
    bytes: int
    """Each input read once, each output written once; for a collective, what this rank sends."""
    work: Work
    is_mixed: bool = False
    """Elementwise, over operands of several dtypes."""
    ranks: tuple[int, ...] = ()
    """Members of a collective."""


@dataclass(frozen=True)
class HostSync:
    """The host waited for the device."""

    what: str
    site: str


@dataclass
class Memory:
    """Bytes of the pretended device's live storages."""

    live: int = 0
    peak: int = 0
    _seen: dict[int, int] = field(default_factory=dict)
    _resized: dict[int, "weakref.ref[torch.UntypedStorage]"] = field(default_factory=dict)
    """Storages that have changed their size once, and may do so again without an operation that shows it."""

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if self._seen.get(key, storage.nbytes()) != storage.nbytes():
            self._resized[key] = weakref.ref(storage)
        for other, reference in self._resized.items():
            if (found := reference()) is not None:
                self.live += found.nbytes() - self._seen[other]
                self._seen[other] = found.nbytes()
        self.peak = max(self.peak, self.live)
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key).atexit = False

    def has_seen(self, tensor: Tensor) -> bool:
        """Whether its storage is counted."""
        return tensor.untyped_storage()._cdata in self._seen

    def _freed(self, key: int) -> None:
        self.live -= self._seen.pop(key)
        self._resized.pop(key, None)


class Recorder(TorchDispatchMode):
    """Lists every operation on meta tensors while it is active, and follows their memory."""

    def __init__(self, is_gpu: bool, pinned: PinnedMemory) -> None:
        super().__init__()
        self.is_gpu, self.pinned = is_gpu, pinned
        self.memory = Memory()
        self.operations: list[Operation] = []
        self.host_syncs: list[HostSync] = []
        self.is_recording = False
        self._forward_sites: dict[int, str] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Memory is always followed; operations are listed, and the peak is found, inside of this block only."""
        self.memory.peak, self.is_recording = self.memory.live, True
        try:
            yield
        finally:
            self.is_recording = False

    def host_sync(self, what: str) -> None:
        if self.is_recording and self.is_gpu:
            self.host_syncs.append(HostSync(what, self._site()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            name = function._schema.name.partition("::")[2]
            result = self._computed(function, name, args, kwargs)
            outputs = [x for x in _tensors((result,)) if x.is_meta]
            for tensor in outputs:
                self.memory.see(tensor)
            inputs = list(_tensors((args, kwargs)))
            if self.is_recording and (outputs or any(x.is_meta for x in inputs)):
                self._record(function, name, args, kwargs, inputs, outputs)
        return result

    # -- what is computed, on shapes

    def _computed(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The result of an operation; where its shape or value depends on values, what they are taken to be."""
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "_local_scalar_dense" and x is not None and x.is_meta:
            self.host_sync("item()")
            real = getattr(x, "real_values", None)
            return torch.ones((), dtype=x.dtype).item() if real is None else real.item()
        if name == "nonzero" and x is not None and x.is_meta:
            self.host_sync("nonzero()")
            return torch.empty(x.numel(), x.dim(), dtype=torch.int64, device="meta")
        if name == "masked_select" and x is not None and x.is_meta:
            self.host_sync("masked_select()")
            return torch.empty(torch.broadcast_shapes(x.shape, args[1].shape), dtype=x.dtype, device="meta").flatten()
        if name == "_to_copy" and x is not None and x.is_meta and kwargs.get("device") == torch.device("cpu"):
            self.host_sync("to('cpu')")
            return torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        if name == "_to_copy" and x is not None and not x.is_meta and kwargs.get("device") == torch.device("meta"):
            self._copy_between(x, kwargs.get("non_blocking", False), "to() from the host")
        if name == "copy_" and x is not None and isinstance(args[1], Tensor) and x.is_meta != args[1].is_meta:
            host = args[1] if x.is_meta else x
            self._copy_between(host, args[2] if len(args) > 2 else kwargs.get("non_blocking", False), "copy_()")
            return x
        if function is torch.ops.aten.addmm.dtype_out:  # torch has no meta implementation of it
            return kwargs["out"]
        if name.startswith("index") and x is not None and x.is_meta and isinstance(args[1], list | tuple):
            args = (x, self._without_masks(args[1]), *args[2:])
        try:
            return function(*args, **kwargs)
        except NotImplementedError as error:
            raise ConfigError(
                f"{self._site()} calls {function}, which cannot be traced: {str(error).splitlines()[0]}\n"
                "  torch can compute it only from real values."
            ) from None

    def _copy_between(self, host: Tensor, non_blocking: bool, what: str) -> None:
        if not (non_blocking and host in self.pinned):
            self.host_sync(what)

    def _without_masks(self, indices: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Boolean masks as the indices of all of their elements."""
        found: list[Tensor | None] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) and index.is_meta:
                self.host_sync("indexing by a mask")
                found += [torch.empty(index.numel(), dtype=torch.int64, device="meta") for _ in range(index.dim())]
            else:
                found.append(index)
        return found

    # -- what it costs

    def _record(
        self, function: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        schema = function._schema
        site, files = self._site(), _files(sys._getframe())
        if schema.name.startswith("c10d::"):
            self._record_collective(name, args, site, files)
            return
        if name in _NO_KERNEL or (not schema.is_mutable and _is_view(inputs, outputs)):
            return
        floating = [x for x in (*inputs, *outputs) if x.is_floating_point()]
        work = _product(name, args) or _attention(name, args) or Work(floating[0].dtype if floating else torch.float32)
        if _runs_again(files):
            work = replace(work, flops=0, recomputed_flops=work.flops + work.recomputed_flops)
        operands = [x for x in inputs if x.dim() > 0]
        elementwise = work.product is None and work.attention is None and name not in _COPIES
        mixed = elementwise and len(operands) > 1 and len({x.dtype for x in (*operands, *outputs)}) > 1
        self.operations.append(
            Operation(
                _kind(name, site),
                name,
                site,
                files,
                " ".join(map(_shape, inputs[:3])),
                _KERNELS.get(name, 1) + work.more_kernels,
                _traffic(name, schema, args, kwargs, inputs, outputs),
                work,
                is_mixed=mixed and schema.name.startswith("aten::"),
            )
        )

    def _record_collective(self, name: str, args: Any, site: str, files: frozenset[str]) -> None:
        group = next((x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())), None)
        ranks: tuple[int, ...] = ()
        if group is not None:
            boxed = torch._C._distributed_c10d.ProcessGroup.unbox(group)
            ranks = tuple(torch.distributed.get_process_group_ranks(boxed))
        tensors = list(_tensors(args))
        size = max((_unique_bytes(x) for x in tensors), default=0)
        steps = len(ranks) - 1
        share = 2 * steps / max(1, len(ranks)) if "allreduce" in name else steps / max(1, len(ranks))
        if name in ("send", "recv_", "broadcast_"):
            share = 1
        shapes = " ".join(map(_shape, tensors[:2]))
        work = Work(tensors[0].dtype if tensors else torch.float32)
        self.operations.append(
            Operation("collectives", name.strip("_"), site, files, shapes, 1, int(size * share), work, ranks=ranks)
        )

    # -- where it is called

    def _site(self) -> str:
        """The innermost line in megagap; where that is the executor's call of autograd, the forward operation's."""
        node = torch._C._current_autograd_node()
        site = _innermost(sys._getframe(1))
        if node is None:
            if torch.is_grad_enabled():
                self._forward_sites[torch.autograd._get_sequence_nr() - 1] = site
            return site
        if site.startswith(_EXECUTOR):
            return self._forward_sites.get(node._sequence_nr(), site)
        return site


def _runs_again(files: frozenset[str]) -> bool:
    """Whether this is a forward pass within a backward pass (``train.recompute``): modules are called there only so."""
    return torch._C._current_autograd_node() is not None and any(file.startswith("model/") for file in files)


def _our_frames(frame: FrameType | None) -> Iterator[tuple[str, int]]:
    """File and line of each frame in megagap, from the innermost on."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE) and not file.startswith(_HERE):
            yield file[len(_PACKAGE) :], frame.f_lineno
        frame = frame.f_back


def _innermost(frame: FrameType) -> str:
    return next((f"{file}:{line}" for file, line in _our_frames(frame)), "unknown")


def _files(frame: FrameType) -> frozenset[str]:
    return frozenset(file for file, _ in _our_frames(frame))


def _kind(name: str, site: str) -> str:
    file = site.partition(":")[0]
    by_file = _KIND_OF_FILE.get(file)
    if name in MATRIX_PRODUCTS:
        return by_file if by_file in ("attention", "optimizer") else "matrix products"
    for part, kind in _KIND_OF_NAME:
        if part in name:
            return kind
    if by_file is not None:
        return by_file
    if file == "optim/gradient_store.py" and name in ("zero_", "fill_", "add_"):
        return "gradient accumulation"
    return "copies and casts" if name in _COPIES else "other"


def _product(name: str, args: Any) -> Work | None:
    if name not in MATRIX_PRODUCTS:
        return None
    left, right = args[:2] if name in ("mm", "bmm") else args[1:3]
    sizes = left.shape[-2], right.shape[-1], left.shape[-1]
    return Work(left.dtype, flops=2 * prod(sizes) * (left.shape[0] if left.dim() == 3 else 1), product=sizes)


def _attention(name: str, args: Any) -> Work | None:
    if "attention" not in name and "varlen" not in name:
        return None
    backward = name.endswith("_backward")
    kernel = next((kernel for kernel in ("cudnn", "efficient") if kernel in name), "flash")
    query, key = args[1:3] if backward else args[:2]
    head = query.shape[-1]
    if query.dim() == 3:  # documents laid end to end, [tokens, heads, size]
        scores = query.shape[1] * _document_squares(query, args)
        grouped = query.shape[1] != key.shape[1]
    else:
        batch, heads, length, _ = query.shape
        scores = batch * heads * length * key.shape[2]
        grouped = heads != key.shape[1]
    one = 2 * scores * head
    flops, again = (4 * one, one) if backward else (2 * one, 0)
    # Gradients of shared keys are added up by two more kernels.
    more = 2 if backward and grouped else 0
    return Work(query.dtype, flops, again, (flops + again) // 2, None, (kernel, head, backward), more)


def _document_squares(query: Tensor, args: Any) -> int:
    """The sum of the squared lengths of documents, from their boundaries; of equal ones if their values are unknown."""
    borders = next(x for x in args if isinstance(x, Tensor) and x.dim() == 1 and x.dtype == torch.int32)
    real = getattr(borders, "real_values", None)
    if real is not None:
        return int(real.diff().long().square().sum())
    return query.shape[0] ** 2 // max(1, borders.numel() - 1)


def _shape(x: Tensor) -> str:
    return "×".join(map(str, x.shape)) or "1"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_view(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    given = {x.untyped_storage()._cdata for x in inputs}
    return bool(outputs) and all(x.untyped_storage()._cdata in given for x in outputs)


def _unique_bytes(x: Tensor) -> int:
    """What an expanded tensor holds counts once."""
    return x.element_size() * prod(size for size, step in zip(x.shape, x.stride(), strict=True) if step or size == 0)


def _traffic(name: str, schema: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes read and written: each input read once, each output written once."""
    written = {id(x): x for x in outputs}
    overwritten = set()
    for argument, value in zip(schema.arguments, (*args, *([None] * len(schema.arguments))), strict=False):
        value = kwargs.get(argument.name, value)
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        for x in _tensors(value):
            written[id(x)] = x
            if argument.is_out or name in _WRITES_ONLY:
                overwritten.add(id(x))
    table = {"embedding": 1, "gather": 0, "index_select": 0, "index": 0}
    if name in table:  # reads the rows that it picks
        rows = sum(map(_unique_bytes, outputs))
        return 2 * rows + _unique_bytes(inputs[-1])
    if name == "embedding_dense_backward":  # clears the table; reads the rows, adds up parts, reads and writes these
        return sum(map(_unique_bytes, outputs)) + 4 * _unique_bytes(inputs[0])
    if name in ("index_put_", "index_add_"):  # reads the rows given; reads and writes, at most, as many of the table
        return 3 * _unique_bytes(max(inputs[1:], key=_unique_bytes))
    read = {id(x): x for x in inputs if id(x) not in overwritten}
    return sum(map(_unique_bytes, read.values())) + sum(map(_unique_bytes, written.values()))
