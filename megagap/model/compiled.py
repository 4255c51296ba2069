"""Layers under torch.compile: ``train.compile``.

What is compiled is a layer's training pass, as one graph without breaks, and forward and backward of each: between the
operations that stay as they are (megagap's kernels, and the linear layers with their collectives and weight gradients,
see ``parallel/opaque.py``), torch fuses what is left, of which attention in blocks of queries is the largest part. All
layers of a rank share the code. Where attention cannot be traced, or is one library call anyway, there are two graphs,
before and after it. Passes without gradients (evaluation, generation) are not compiled: their shapes vary.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megagap.errors import CompileError
from megagap.files import sources_digest
from megagap.model.attention import KeyValueCache
from megagap.model.llama import Layer, LlamaStage
from megagap.ops.document_mask import Documents
from megagap.parallel.context import OwnDocuments
from megagap.parallel.opaque import make_opaque

log = logging.getLogger(__name__)

GRAPHS_PER_LENGTH = 2
"""The first layer of a stage has no update of a layer before to add."""


def compile_layers(stages: Sequence[LlamaStage], lengths: int = 1, backend: str = "inductor") -> None:
    """Compile the stages' layers when they are first used in training. ``lengths``: different lengths of sequences
    that they will be used with, each of which is compiled once. ``backend``: of torch.compile; ``aot_eager`` makes the
    same graphs, and runs them as they are.

    Raises :class:`CompileError` if this machine lacks what torch.compile needs.
    """
    if hasattr(torch.compiler.config, "cache_key_tag"):  # from torch 2.7 on
        # Torch keeps code on disk, and would find it by a graph that names operations of ours which have changed.
        torch.compiler.config.cache_key_tag = f"megagap {sources_digest()}"
    if backend == "inductor" and stages:
        require_compiler(stages[0].tensor_parallel.mesh.device)
    for stage in stages:
        _allow_graphs(lengths * GRAPHS_PER_LENGTH)
        for layer in stage.layers:
            assert isinstance(layer, Layer) and "forward" not in vars(layer), "what wraps it comes after compiling"
            make_opaque(layer.modules())
            # Not the module as a whole: its hooks wait for parameters, which is no part of the graph.
            layer.forward = _CompiledLayer(layer, backend, in_one=_attention_is_traced(stage))  # type: ignore[method-assign]
    log.info("torch.compile compiles the layers in the first step, which takes longer")


def _attention_is_traced(stage: LlamaStage) -> bool:
    """Whether attention of whole sequences is part of the graph. On a GPU it is one call of a library, which there is
    nothing to fuse with; context parallelism communicates in it."""
    mesh = stage.tensor_parallel.mesh
    return mesh.device.type == "cpu" and mesh.cp.size == 1


def require_compiler(device: torch.device) -> None:
    """Raises :class:`CompileError` if torch cannot compile for this device, which a small function shows."""
    try:
        torch.compile(_probe, fullgraph=True, dynamic=False)(torch.ones(64, device=device))
    except Exception as error:
        needs = "triton and a C compiler" if device.type == "cuda" else "a C++ compiler and Python's headers"
        raise CompileError(
            f"train.compile = true: torch cannot compile on this machine: {_reason(error)}\n"
            f"  it needs {needs} (Debian: apt-get install g++ python3-dev; CXX names another compiler).\n"
            "  Install them, or set train.compile = false."
        ) from error


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1


def _reason(error: Exception) -> str:
    """The line of an error that says most: a compiler's first complaint, else the first of its own."""
    cause = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    complaints = [line for line in lines if " error: " in line]
    return (complaints or lines or [type(cause).__name__])[0]


class _CompiledLayer:
    """The ``forward`` of a layer."""

    def __init__(self, layer: Layer, backend: str, *, in_one: bool) -> None:
        """``in_one``: one graph, with attention, unless sequences are packed from documents, whose borders only the
        host knows."""
        self._layer, self._plain, self._in_one = layer, layer.forward, in_one
        functions = (_whole, _before_attention, _after_attention)
        self._whole, self._before_attention, self._after_attention = (_compiled(f, backend) for f in functions)

    def __call__(
        self,
        x: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        documents: Documents | OwnDocuments | None = None,
    ) -> tuple[Tensor, Tensor]:
        layer = self._layer
        if cache is not None or not torch.is_grad_enabled():
            return self._plain(x, update, cos, sin, cache, documents)
        # Weights are no inputs of the graph, so it is only through x that its backward pass is called.
        assert x.requires_grad
        if self._in_one and documents is None:
            whole: tuple[Tensor, Tensor] = self._whole(layer, x, update, cos, sin)
            return whole
        positions = None if documents is None else documents.positions
        q, k, v, x = self._before_attention(layer, x, update, cos, sin, positions)
        mixed = layer.self_attn.mix(q, k, v, documents)
        x, update = self._after_attention(layer, x, mixed)
        return x, update


def _whole(layer: Layer, x: Tensor, update: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, x = _before_attention(layer, x, update, cos, sin)
    return _after_attention(layer, x, layer.self_attn.mix(q, k, v))


def _before_attention(
    layer: Layer, x: Tensor, update: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, and the residual stream."""
    entering, x, _ = layer.before_attention(x, update)
    return *layer.self_attn.project(entering, cos, sin, positions), x


def _after_attention(layer: Layer, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    return layer.after_attention(x, layer.self_attn.o_proj(mixed.flatten(2)))


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """``function`` as one graph: a break in it is an error, and shapes are constants of the code."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def _allow_graphs(number: int) -> None:
    """Allow so many more in this process. A function that is compiled more often than a limit, torch takes for a
    mistake."""
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, getattr(config, name) + number)
