"""Layers under torch.compile: ``train.compile``.

What is compiled is a layer's training pass, as one graph without breaks, and forward and backward of each: between the
operations that stay as they are (megagap's kernels, and the linear layers with their collectives and weight gradients,
see ``parallel/opaque.py``), torch fuses what is left, of which attention in blocks of queries is the largest part. All
layers of a rank share the code. Where attention cannot be traced, or is one library call anyway, there are two graphs,
before and after it. Passes without gradients (evaluation, generation) are not compiled: their shapes vary.
"""

from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megagap.errors import CompileError
from megagap.model.attention import KeyValueCache
from megagap.model.llama import Layer, LlamaStage
from megagap.ops.document_mask import Documents
from megagap.parallel.opaque import make_opaque

GRAPHS_PER_LENGTH = 2
"""The first layer of a stage has no update of a layer before to add."""


def compile_layers(stages: Iterable[LlamaStage], lengths: int = 1, backend: str = "inductor") -> None:
    """Compile the stages' layers when they are first used in training. ``lengths``: different lengths of sequences
    that they will be used with, each of which is compiled once. ``backend``: of torch.compile; ``aot_eager`` makes the
    same graphs, and runs them as they are.

    Raises :class:`CompileError` if this machine lacks what torch.compile needs.
    """
    for stage in stages:
        if backend == "inductor":
            require_compiler(stage.tensor_parallel.mesh.device)
        _allow_graphs(lengths * GRAPHS_PER_LENGTH)
        for layer in stage.layers:
            assert isinstance(layer, Layer)
            make_opaque(layer.modules())
            # Not the module as a whole: its hooks wait for parameters, which is no part of the graph.
            layer.forward = _CompiledLayer(layer, backend)  # type: ignore[method-assign]


def require_compiler(device: torch.device) -> None:
    """Raises :class:`CompileError` if torch's compiler cannot make code for this device."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise CompileError(_cannot("torch compiles for GPUs with triton, which is not installed", "install it"))
        return
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        reason = f"torch compiles for CPUs with a C++ compiler, and found none ({_first_line(error)})"
        raise CompileError(_cannot(reason, "install one (Debian: g++), or name yours in the variable CXX")) from error


class _CompiledLayer:
    """The ``forward`` of a layer."""

    def __init__(self, layer: Layer, backend: str) -> None:
        self._layer, self._plain = layer, layer.forward
        functions = (_whole, _before_attention, _after_attention)
        self._whole, self._before_attention, self._after_attention = (_compiled(f, backend) for f in functions)

    def __call__(
        self,
        x: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        layer = self._layer
        if cache is not None or not torch.is_grad_enabled():
            return self._plain(x, update, cos, sin, cache, documents)
        # Weights are no inputs of the graph, so it is only through x that its backward pass is called.
        assert x.requires_grad
        if x.device.type == "cpu" and documents is None:
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
    normalised, x = layer.input_layernorm(x, update)
    return *layer.self_attn.project(normalised, cos, sin, positions), x


def _after_attention(layer: Layer, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    normalised, x = layer.post_attention_layernorm(x, layer.self_attn.o_proj(mixed.flatten(2)))
    return x, layer.mlp(normalised)


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """``function`` as one graph: a break in it is an error, and shapes are constants of the code."""
    graph = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    def call(*arguments: Any) -> Any:
        try:
            return graph(*arguments)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = f"torch.compile failed: {_first_line(getattr(error, 'inner_exception', error))}"
            raise CompileError(_cannot(reason, "see the cause above")) from error

    return call


def _allow_graphs(number: int) -> None:
    """Allow so many more in this process. A function that is compiled more often than a limit, torch takes for a
    mistake."""
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, getattr(config, name) + number)


def _cannot(reason: str, cure: str) -> str:
    return f"train.compile = true: {reason}\n  {cure}, or set train.compile = false."


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
