"""The linear layers at the borders of regions, and sums over tp, as operations that torch.compile does not look into.

What they do beside arithmetic cannot be part of a compiled graph: they start collectives and wait for them, add weight
gradients to their sinks, whose buckets are reduced once they are complete, and queue them for zero-bubble schedules. So
a graph calls each as one operation, which runs the autograd functions of ``tensor.py`` themselves. Their order is the
same on all ranks: each needs what the one before has made, in the forward and in the backward pass.

A graph's inputs are tensors. So an operation names its layers by numbers in tensors, which are inputs like all others:
one graph serves all layers of the same shapes. Weights are no inputs, since a graph neither reads them nor computes a
gradient for them; between its uses they may be freed and gathered again.
"""

from collections.abc import Iterable, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from megagap.parallel.collectives import all_reduce
from megagap.parallel.projection_norm import ProjectionNorm
from megagap.parallel.tensor import ColumnParallelLinear, RowParallelLinear, _ColumnProducts, _RowProduct

_numbers = count()
_layers: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
"""What the numbers in graphs mean. A graph cannot refer to objects, so there is one table in the process."""


def make_opaque(modules: Iterable[nn.Module]) -> None:
    """Let what communicates among these modules be operations of their own wherever they are compiled."""
    for module in modules:
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | ProjectionNorm) and module.number is None:
            number = next(_numbers)
            _layers[number] = module
            module.number = torch.tensor(number)


def _find(numbers: Sequence[Tensor]) -> list[Any]:
    return [_layers[int(number)] for number in numbers]


def _context(layers: Sequence[Any], x: Tensor, first_weight: int) -> SimpleNamespace:
    """What autograd hands to the backward pass of a function of ``tensor.py`` over these layers, whose weights are its
    arguments from number ``first_weight`` on."""
    weights = [layer.weight for layer in layers]
    sinks = [getattr(weight, "sink", None) for weight in weights]
    others = (False,) * (first_weight - 1)
    return SimpleNamespace(
        saved_tensors=(*weights, x),
        weight_count=len(weights),
        make_input=lambda x: x,
        read_again=(),
        needs_input_grad=(True, *others, *(weight.requires_grad for weight in weights)),
        region=layers[0].region,
        queue=layers[0].queue,
        sinks=sinks,
        sink=sinks[0],
    )


def _kept(layers: Sequence[Any], *tensors: Tensor) -> list[Tensor]:
    """``tensors``, or copies where weight gradients are deferred: a graph reuses memory that it no longer needs."""
    return [tensor.clone() for tensor in tensors] if layers[0].queue.is_deferring else list(tensors)


def _input_gradient(layers: Sequence[Any], gradients: tuple[Tensor | None, ...], first_weight: int) -> Tensor:
    """The first of a function's gradients, once those of weights without a sink are where autograd would put them."""
    grad_x, of_weights = gradients[0], gradients[first_weight : first_weight + len(layers)]
    for layer, gradient in zip(layers, of_weights, strict=True):
        if gradient is not None:
            torch.autograd.backward(layer.weight, gradient)
    assert grad_x is not None
    return grad_x


@torch.library.custom_op(
    "megagap_parallel::column_products",
    mutates_args=(),
    schema="(Tensor x, Tensor[] layers, int length, int[] widths) -> Tensor[]",
)
def column_products(x: Tensor, layers: Sequence[Tensor], length: int, widths: Sequence[int]) -> list[Tensor]:
    """x: [b, s or s / tp, in]. Results: [b, s, width] of each layer. ``length`` is s."""
    found = _find(layers)
    with torch.no_grad():
        weights = [layer.weight for layer in found]
        return list(_ColumnProducts.apply(x, found[0].region, found[0].queue, None, False, *weights))


@column_products.register_fake
def _(x: Tensor, layers: Sequence[Tensor], length: int, widths: Sequence[int]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], length, width) for width in widths]


@torch.library.custom_op(
    "megagap_parallel::column_products_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor[] grads, Tensor[] layers) -> Tensor",
)
def column_products_backward(x: Tensor, grads: Sequence[Tensor], layers: Sequence[Tensor]) -> Tensor:
    """The gradient of x; those of the weights go where they are summed."""
    found = _find(layers)
    x, *grads = _kept(found, x, *grads)
    return _input_gradient(found, _ColumnProducts.backward(_context(found, x, 5), *grads), 5)


@column_products_backward.register_fake
def _(x: Tensor, grads: Sequence[Tensor], layers: Sequence[Tensor]) -> Tensor:
    return x.new_empty(x.shape)


def _column_setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    x, layers, _, _ = inputs
    ctx.save_for_backward(x, *layers)


def _column_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor, list[None], None, None]:
    x, *layers = ctx.saved_tensors
    return column_products_backward(x, list(grads), layers), [None] * len(layers), None, None


column_products.register_autograd(_column_backward, setup_context=_column_setup)


@torch.library.custom_op(
    "megagap_parallel::row_product",
    mutates_args=(),
    schema="(Tensor x, Tensor layer, int length, int width) -> Tensor",
)
def row_product(x: Tensor, layer: Tensor, length: int, width: int) -> Tensor:
    """x: [b, s, in / tp]. Result: [b, length, width], ``length`` being s or s / tp."""
    (found,) = _find([layer])
    with torch.no_grad():
        y: Tensor = _RowProduct.apply(x, found.region, found.queue, found.weight, None, found.computes)
        return y.contiguous()  # as a graph expects; what is not computed has no memory of its own


@row_product.register_fake
def _(x: Tensor, layer: Tensor, length: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], length, width)


@torch.library.custom_op(
    "megagap_parallel::row_product_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor grad, Tensor layer) -> Tensor",
)
def row_product_backward(x: Tensor, grad: Tensor, layer: Tensor) -> Tensor:
    """The gradient of x; that of the weight goes where it is summed."""
    found = _find([layer])
    x, grad = _kept(found, x, grad)
    return _input_gradient(found, _RowProduct.backward(_context(found, x, 3), grad), 3)


@row_product_backward.register_fake
def _(x: Tensor, grad: Tensor, layer: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _row_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, layer, _, _ = inputs
    ctx.save_for_backward(x, layer)


def _row_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return row_product_backward(ctx.saved_tensors[0], grad, ctx.saved_tensors[1]), None, None, None


row_product.register_autograd(_row_backward, setup_context=_row_setup)


@torch.library.custom_op("megagap_parallel::summed", mutates_args=(), schema="(Tensor x, Tensor norm) -> Tensor")
def summed(x: Tensor, norm: Tensor) -> Tensor:
    """The sum of x over tp; its gradient's, in the backward pass."""
    return all_reduce(x.clone(), _find([norm])[0].tp)


@summed.register_fake
def _(x: Tensor, norm: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _summed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


summed.register_autograd(lambda ctx, grad: (summed(grad, ctx.saved_tensors[0]), None), setup_context=_summed_setup)
