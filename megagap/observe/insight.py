"""What every n-th step tells of each part of the model (``run.insight_every``): norms, changes, largest activations.

A part is a layer's matrices and biases (``layers.3``), its norms' gains (``layers.3.norms``), the embedding
(``embed_tokens``), the last norm (``norm``) or the output projection (``lm_head``, unless it is tied). Each element of
a parameter is counted by the one rank that owns it, so the sums over the world are those of the global tensors, in
every layout. Nothing here waits for the device: the numbers travel with the step's others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megagap.config import Model
from megagap.model.shapes import is_norm_gain, layer_of, model_tensors
from megagap.optim.clipping import squared_norm
from megagap.optim.gradient_store import Bucket
from megagap.optim.loss_scale import NoLossScale
from megagap.parallel.collectives import all_reduce
from megagap.parallel.mesh import Mesh

NORMS = ("weight_norm", "gradient_norm", "update_norm")
CHANGED, LARGEST = "changed", "activation_max"


def model_parts(model: Model) -> list[str]:
    """In the order of the forward pass."""
    return list(dict.fromkeys(map(part_of, model_tensors(model))))


def part_of(parameter: str) -> str:
    """The part that a parameter, by its Hugging Face name, belongs to."""
    layer = layer_of(parameter)
    return f"{layer}.norms" if layer.startswith("layers.") and is_norm_gain(parameter) else layer


class Insight:
    """Measures one step on this rank: its forward passes, and the update of each bucket.

    Meanwhile there are two fp32 copies of the slice of the bucket that is being updated.
    """

    def __init__(self, model: Model, device: torch.device, loss_scale: NoLossScale) -> None:
        """``loss_scale``: of the gradients that it sees."""
        self._loss_scale = loss_scale
        self._numbers = {part: i for i, part in enumerate(model_parts(model))}
        self._sums = torch.zeros(len(NORMS) + 2, len(self._numbers), device=device)
        """[5, parts] Of this rank's elements: squares of weights, gradients and updates, how many changed, how many."""
        self._largest = torch.zeros(model.num_hidden_layers, device=device)

    def layer_output(self, layer: int, output: Tensor) -> None:
        """``output``: the residual stream behind a layer, for one microbatch."""
        self._largest[layer] = torch.maximum(self._largest[layer], output.abs().amax().float())

    @contextmanager
    def updating(self, bucket: Bucket) -> Iterator[None]:
        """Around the update of a bucket whose gradient is complete."""
        if not bucket.is_owned:
            yield
            return
        self._add_squares(1, bucket, bucket.own_gradient)
        before, values = bucket.masters().clone(), bucket.own_values.clone()
        yield
        weights = bucket.masters()
        self._add_squares(0, bucket, weights)
        self._add_squares(2, bucket, torch.sub(weights, before, out=before))
        for part in bucket.slices(CHANGED, bucket.own_values != values):
            number = self._numbers[part_of(part.shard.name)]
            self._sums[3, number] += part.tensor.count_nonzero()
            self._sums[4, number] += part.tensor.numel()

    def _add_squares(self, row: int, bucket: Bucket, values: Tensor) -> None:
        for part in bucket.slices(NORMS[row], values):
            self._sums[row, self._numbers[part_of(part.shard.name)]] += squared_norm([part.tensor])

    def over_world(self, mesh: Mesh) -> Tensor:
        """All numbers of the step, the same on every rank, fp32 on the device; :func:`insight_record` names them."""
        sums = all_reduce(self._sums, mesh.world)
        largest = all_reduce(self._largest, mesh.world, dist.ReduceOp.MAX)
        weights, gradients, updates = sums[:3].sqrt()
        return torch.cat([weights, self._loss_scale.unscaled(gradients), updates, sums[3] / sums[4], largest])


def insight_record(numbers: Sequence[float], model: Model) -> dict[str, float]:
    """What metrics.jsonl has of ``numbers``, those of :meth:`Insight.over_world`: ``weight_norm/layers.0``, …"""
    keys = [f"{name}/{part}" for name in (*NORMS, CHANGED) for part in model_parts(model)]
    keys += [f"{LARGEST}/layers.{i}" for i in range(model.num_hidden_layers)]
    return dict(zip(keys, numbers, strict=True))
