"""One fault at a time is put into the code: the proof reports each, naming parameter, axis or call site.

docs/parallelism.md lists them.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import megagap.model.llama
import megagap.optim.gradient_store
import megagap.parallel.context
import megagap.parallel.cross_entropy
import megagap.parallel.embedding
import megagap.parallel.tensor
import megagap.training.step
from megagap.config import Settings, load_recipe
from megagap.optim.gradient_store import Bucket
from megagap.parallel.collectives import Pending, all_reduce
from megagap.parallel.context import places_of
from megagap.parallel.layout import Layout
from megagap.parallel.schedule import SCHEDULES, Backward
from megagap.parallel.shard import Shard
from megagap.parallel.tensor import Region, TensorParallel
from megagap.planning.certificate import Certificate, certify
from megagap.planning.coverage import coverage_faults, group_faults, group_orders, holdings
from megagap.planning.devices import load_device
from megagap.planning.gradient_types import Finding, gradient_types
from megagap.training.mesh import make_layout

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples/recipes/code.toml"

TP = ["parallel.tp=2", "train.micro_batch_size=1"]
PLAIN = [*TP, "parallel.sequence_parallel=false"]
DP = ["train.micro_batch_size=1"]
SHARED_KEYS = ["parallel.tp=4", "train.micro_batch_size=1", "model.num_key_value_heads=2"]
TIED = ["parallel.pp=2", "train.micro_batch_size=1", "model.tie_word_embeddings=true"]

RING = ["parallel.cp=2", "train.micro_batch_size=1"]
ALL_KEYS = [*RING, "parallel.context_mode=allgather"]
BY_HEADS = [*RING, "parallel.context_mode=alltoall"]
PARTS = [*DP, "parallel.dp_replicate=2"]
UNSHARDED = [*DP, "optim.zero=0"]
SLICES = [*DP, "optim.zero=2"]
SHARDED = [*DP, "optim.zero=3"]
DEFERRED = [*SLICES, "parallel.pp=2", "parallel.schedule=zb-h1"]
CHUNKS = ["parallel.pp=2", "parallel.vpp=2", "train.micro_batch_size=1"]

Apply = Callable[[pytest.MonkeyPatch], None]


def settings_of(ranks: int, *overrides: str) -> Settings:
    return load_recipe(RECIPE, overrides, ranks, needs_data=False)


def findings(ranks: int, *overrides: str) -> list[Finding]:
    return gradient_types(settings_of(ranks, *overrides), ranks).findings


def record(of: Callable[[Shard], bool], **changes: Any) -> Apply:
    """Parameters' records are wrong."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = TensorParallel.parameter

        def parameter(self: TensorParallel, shard: Shard) -> Any:
            return original(self, replace(shard, **changes) if of(shard) else shard)

        patch.setattr(TensorParallel, "parameter", parameter)

    return apply


def border(function: str, how: str) -> Apply:
    """What a function asks of a region's border goes wrong: a sum is left out or made twice, a gather is made of one
    rank's part only."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        total, gather = Region.sum, Region.gather

        def is_here() -> bool:
            return any(frame.frame.f_code.co_qualname == function for frame in inspect.stack(0)[2:5])

        def wrong_sum(self: Region, y: torch.Tensor) -> Pending:
            if not is_here():
                return total(self, y)
            if how == "drop":
                part = y.chunk(self.tp.size, 1)[self.tp.rank].contiguous() if self.sequence_parallel else y
                return Pending(part)
            once = total(self, y).wait()
            return Pending(once * self.tp.size) if self.sequence_parallel else total(self, once)

        def wrong_gather(self: Region, x: torch.Tensor) -> Pending:
            if how != "drop gather" or not is_here():
                return gather(self, x)
            return Pending(torch.cat([x] * self.tp.size, 1) if self.sequence_parallel else x)

        if how == "drop gather":
            patch.setattr(Region, "gather", wrong_gather)
        else:
            patch.setattr(Region, "sum", wrong_sum)

    return apply


def replaced(module: Any, name: str, new: Any) -> Apply:
    return lambda patch: patch.setattr(module, name, new)


def _own_slice(output: torch.Tensor, tensor: torch.Tensor, axis: Any) -> None:
    output.copy_(tensor.chunk(axis.size)[axis.rank])


def _count_twice(original: Any) -> Any:
    def reduce(output: torch.Tensor, tensor: torch.Tensor, axis: Any) -> None:
        original(output, tensor, axis).wait()
        output.mul_(2)

    return reduce


def _extra_call(patch: pytest.MonkeyPatch) -> None:
    """One rank of tp calls a collective that the other does not."""
    gather = Region.gather

    def uneven(self: Region, x: torch.Tensor) -> Pending:
        if self.tp.rank == 1:
            all_reduce(torch.ones(3), self.tp)
        return gather(self, x)

    patch.setattr(Region, "gather", uneven)


def _missing_call(patch: pytest.MonkeyPatch) -> None:
    """One data rank does not take part in a reduction."""
    original = megagap.optim.gradient_store.reduce_scatter_flat_async

    def uneven(output: torch.Tensor, tensor: torch.Tensor, axis: Any) -> Any:
        return original(output, tensor, axis) if axis.rank == 0 else None

    patch.setattr(megagap.optim.gradient_store, "reduce_scatter_flat_async", uneven)


def _gradients_stay(patch: pytest.MonkeyPatch) -> None:
    """Keys and values travel, their gradients do not."""
    original = megagap.parallel.context.pass_on_async

    def keep_gradients(x: torch.Tensor, axis: Any) -> Pending:
        caller = "".join(inspect.stack(1)[1].code_context or [])
        return Pending(x) if "carried = pass_on_async" in caller else original(x, axis)

    patch.setattr(megagap.parallel.context, "pass_on_async", keep_gradients)


def _own_part(x: torch.Tensor, axis: Any, dim: int) -> Pending:
    return Pending(x.unflatten(dim, (axis.size, -1)).select(dim, axis.rank).contiguous())


def _repeat_own(output: torch.Tensor, tensor: torch.Tensor, axis: Any) -> None:
    output.copy_(tensor.repeat(axis.size))


def _others_targets(patch: pytest.MonkeyPatch) -> None:
    """What is cut second, the targets, is cut for another rank."""
    calls = count()

    def cut(x: torch.Tensor, cp: Any) -> torch.Tensor:
        if cp.size == 1:
            return x
        rank = (cp.rank + next(calls) % 2) % cp.size
        return x[..., places_of(rank, cp.size, x.shape[-1], x.device)]

    patch.setattr(megagap.training.step, "own_tokens", cut)


def _forget_sum(patch: pytest.MonkeyPatch) -> None:
    original = Bucket.start_reduction

    def forget(self: Bucket) -> None:
        self.holds_sum = False
        original(self)

    patch.setattr(Bucket, "start_reduction", forget)


def _stale_memory(patch: pytest.MonkeyPatch) -> None:
    """What nothing was added to since the last reduction is summed as it lies in memory."""
    original = Bucket.start_reduction

    def without_clearing(self: Bucket) -> None:
        for place in self.places:
            if not place.written:
                place.gradient.fill_(1.0)
                place.written = True
        original(self)

    patch.setattr(Bucket, "start_reduction", without_clearing)


def _swapped_chunks(patch: pytest.MonkeyPatch) -> None:
    """On the second rank only."""
    original = megagap.training.step.BoundStages.compute

    def swapped(self: Any, chunk: int, *others: Any) -> Any:
        is_second = self.stages[0].tensor_parallel.mesh.pp.rank == 1
        return original(self, 1 - chunk if is_second else chunk, *others)

    patch.setattr(megagap.training.step.BoundStages, "compute", swapped)


def is_gain(shard: Shard) -> bool:
    return shard.name.endswith("norm.weight")


def is_key(shard: Shard) -> bool:
    return ".k_proj" in shard.name


def is_table(shard: Shard) -> bool:
    return shard.is_embedding


STORE, LOSS = megagap.optim.gradient_store, megagap.parallel.cross_entropy
CONTEXT = megagap.parallel.context

MUTATIONS: dict[str, tuple[int, list[str], Apply, str, str]] = {
    "the gains' partial_gradient is False under sequence parallelism": (
        2, TP, record(is_gain, partial_gradient=False), "partial_gradient", "layernorm.weight"),
    "the gains' partial_gradient is True without sequence parallelism": (
        2, PLAIN, record(is_gain, partial_gradient=True), "partial_gradient", "over tp every rank computes its whole"),
    "shared keys' partial_gradient is False": (
        4, SHARED_KEYS, record(is_key, partial_gradient=False), "partial_gradient", "k_proj.weight"),
    "a tied embedding's partial_gradient is False": (
        2, TIED, record(is_table, partial_gradient=False), "partial_gradient", "embed_tokens.weight"),
    "gains have no replica_axis": (
        2, PLAIN, record(is_gain, replica_axis=None), "ownership", "counted and saved by 2 to 2 ranks"),
    "a tied embedding has no replica_axis": (
        2, TIED, record(is_table, replica_axis=None), "replica_axis", "embed_tokens.weight"),
    "no sum where a region is left": (
        2, PLAIN, border("_RowProduct.forward", "drop"), "gradient", "the output of model.layers.0.self_attn is wrong"),
    "the same, under sequence parallelism": (
        2, TP, border("_RowProduct.forward", "drop"), "gradient", "the output of model.layers.0.self_attn is wrong"),
    "two sums where a region is left": (
        2, PLAIN, border("_RowProduct.forward", "double"), "summed twice", "_RowProduct.forward"),
    "the same, under sequence parallelism (two)": (
        2, TP, border("_RowProduct.forward", "double"), "gradient", "the output of model.layers.0.self_attn is wrong"),
    "no sum of the input's gradient where a region is entered": (
        2, PLAIN, border("_ColumnProducts.backward", "drop"), "gradient", "the gradient of the output of"),
    "two such sums": (
        2, PLAIN, border("_ColumnProducts.backward", "double"), "summed twice", "_ColumnProducts.backward"),
    "no gather of the output's gradient": (
        2, TP, border("_RowProduct.backward", "drop gather"), "gradient", "o_proj.weight"),
    "no gather of the input for the weights' gradients": (
        2, TP, border("_ColumnProducts.backward", "drop gather"), "gradient", "q_proj.weight"),
    "no sum of the embedding's rows": (
        2, PLAIN, border("_Leave.forward", "drop"), "gradient", "the output of embed_tokens is wrong"),
    "no sum of the output projection's input gradient": (
        2, PLAIN, border("_LinearCrossEntropy.forward", "drop"), "gradient", "the gradient of the output of norm"),
    "the loss is not combined over the vocabulary": (
        2, PLAIN, replaced(LOSS, "all_reduce", lambda x, *_: x), "gradient", "lm_head.weight"),
    "no reduction over data ranks": (
        2, DP, replaced(STORE, "reduce_scatter_flat_async", _own_slice), "gradient", "lm_head.weight"),
    "two reductions over data ranks": (
        2, DP, replaced(STORE, "reduce_scatter_flat_async", _count_twice(STORE.reduce_scatter_flat_async)),
        "gradient", "2 times that of one process"),
    "shares of replicas are not summed": (
        2, TP, replaced(Bucket, "sum_over_replicas", lambda self: Pending(self.own_gradient)),
        "gradient", "layernorm.weight"),
    "targets are counted on this data rank only": (
        2, DP, replaced(megagap.training.step, "count_targets", lambda targets, *_, **__: torch.tensor(
            float(targets.numel()), dtype=torch.float64)), "gradient", "2 times that of one process"),
    "every replica counts and saves": (
        2, TP, replaced(Bucket, "is_owned", property(lambda _: True)), "ownership", "norm.weight"),
    "no replica counts and saves": (
        2, TP, replaced(Bucket, "is_owned", property(lambda self: self.replicas is None)), "ownership", "0 to 0 ranks"),
    "one rank calls a collective that others do not": (
        2, TP, _extra_call, "collectives", "is not the same on all members"),
    "one rank leaves a collective out": (
        2, DP, _missing_call, "collectives", "ranks wait for each other"),
    "keys do not travel around the ring": (
        2, RING, replaced(CONTEXT, "pass_on_async", lambda x, _: Pending(x)), "gradient", "self_attn is wrong"),
    "gradients of keys do not travel around the ring": (
        2, RING, _gradients_stay, "gradient", "k_proj.weight"),
    "all keys are taken to be this rank's": (
        2, ALL_KEYS, replaced(CONTEXT, "all_gather_async", lambda x, axis, dim: Pending(torch.cat([x] * 2, dim))),
        "gradient", "self_attn is wrong"),
    "gradients of keys are not summed over the ranks that used them": (
        2, ALL_KEYS, replaced(CONTEXT, "reduce_scatter_async", _own_part), "gradient", "k_proj.weight"),
    "heads are not exchanged for tokens": (
        2, BY_HEADS, replaced(CONTEXT, "all_to_all_async", lambda x, _: Pending(x)), "gradient", "self_attn is wrong"),
    "ranks have each other's targets": (
        2, RING, _others_targets, "gradient", "the gradient of the output of norm"),
    "no sum over the parts that hold the same slices": (
        4, PARTS, replaced(Bucket, "sum_over_replicate", lambda self: Pending(self.own_gradient)),
        "gradient", "after all reductions"),
    "every part counts and saves its slices": (
        4, PARTS, replaced(Bucket, "is_owned", property(lambda _: True)), "ownership", "2 to 2 ranks"),
    "sharded parameters are this rank's slice, repeated": (
        2, SHARDED, replaced(STORE, "all_gather_flat_async", _repeat_own),
        "gradient", "is wrong"),
    "of several microbatches the last one's gradient overwrites the sum": (
        2, SLICES, _forget_sum, "gradient", "after all reductions"),
    "what no microbatch has added to is not cleared": (
        4, DEFERRED, _stale_memory, "gradient", "after all reductions"),
    "without sharding no gradient is summed": (
        2, UNSHARDED, replaced(STORE, "all_reduce_async", lambda x, _: Pending(x)), "gradient", "after all reductions"),
    "two chunks of a rank have each other's layers": (
        2, CHUNKS, _swapped_chunks, "collectives", ""),
}  # fmt: skip
"""Ranks, settings, the fault, and what is found: its kind, and a part of its message."""


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_examined_step_shows(name, monkeypatch):
    ranks, overrides, apply, kind, text = MUTATIONS[name]
    apply(monkeypatch)
    found = findings(ranks, *overrides)
    assert [x for x in found if x.kind == kind and text in x.message], found


@pytest.mark.parametrize(("ranks", "overrides"), sorted({(m[0], tuple(m[1])) for m in MUTATIONS.values()}))
def test_nothing_is_found_in_the_code_as_it_is(ranks, overrides):
    assert findings(ranks, *overrides) == []


# -- by arithmetic


def faults_with(change: Callable[[Shard], Shard | None], rank: int) -> list[str]:
    """Of a layout in which one rank's records are others."""
    settings = settings_of(8, "parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=1")
    layout = make_layout(settings, 8)
    held = holdings(settings, layout)
    place = next(i for i, holding in enumerate(held) if holding.rank == rank)
    shards = tuple(changed for shard in held[place].shards if (changed := change(shard)) is not None)
    held[place] = replace(held[place], shards=shards)
    return list(coverage_faults(settings, layout, held))


def _first_rows(shard: Shard) -> Shard:
    """Rank 1 holds the rows of rank 0."""
    return replace(shard, offsets=(0, 0)) if "q_proj" in shard.name else shard


def _one_row_less(shard: Shard) -> Shard:
    return replace(shard, sizes=(shard.sizes[0] - 1, shard.sizes[1])) if "q_proj" in shard.name else shard


def test_a_part_that_two_ranks_own_is_named():
    assert any(
        "q_proj.weight" in fault and "owned by rank 0 and by rank 1" in fault for fault in faults_with(_first_rows, 1)
    )


def test_a_row_that_no_rank_owns_is_named():
    assert any("q_proj.weight" in fault and "owned by no rank" in fault for fault in faults_with(_one_row_less, 1))


def test_a_parameter_of_another_shape_is_named():
    faults = faults_with(lambda s: replace(s, shape=(s.shape[0] + 1, *s.shape[1:])) if "lm_head" in s.name else s, 4)
    assert any("lm_head.weight" in fault and "with shape" in fault for fault in faults)


@pytest.mark.parametrize("change", ["gap", "uneven slices", "overlap"])
def test_buckets_that_leave_elements_out_are_named(change):
    settings = settings_of(2, *DP)
    layout = make_layout(settings, 2)
    (held,) = holdings(settings, layout)
    last, *others = reversed(held.arrangement.buckets)
    starts = held.arrangement.starts
    if change == "gap":
        last = replace(last, start=last.start + 128)
    elif change == "uneven slices":
        last = replace(last, stop=last.stop + 1)
    else:
        starts = (starts[1], *starts[1:])
    arrangement = replace(held.arrangement, buckets=(*reversed(others), last), starts=starts)
    assert list(coverage_faults(settings, layout, [replace(held, arrangement=arrangement)]))


def test_groups_made_in_another_order_on_one_rank_are_named():
    layout = Layout(8, pp=2, tp=2)
    orders = group_orders(layout)
    assert list(group_faults(8, orders)) == []
    orders[3] = orders[3][::-1]
    (fault,) = group_faults(8, orders)
    assert "rank 3" in fault and "one order on all ranks" in fault


def test_a_group_that_one_member_does_not_make_is_named():
    layout = Layout(8, pp=2, tp=2)
    orders = group_orders(layout)
    del orders[5][-1]
    (fault,) = group_faults(8, orders)
    assert "waits for rank 5" in fault


def test_a_schedule_that_leaves_out_a_backward_is_named(monkeypatch):
    original = SCHEDULES["1f1b"]

    def broken(*arguments: Any) -> Any:
        return [action for action in original(*arguments) if action != Backward(0)]

    monkeypatch.setitem(SCHEDULES, "1f1b", replace(original, order=broken))
    monkeypatch.setattr(
        "megagap.planning.certificate.gradient_types", lambda settings, ranks: _nothing(settings, ranks)
    )
    monkeypatch.setattr("megagap.planning.certificate.memory_by_stage", lambda *_: [])
    settings = settings_of(2, "parallel.pp=2", "train.micro_batch_size=1")
    certificate: Certificate = certify(settings, load_device("h100"), 2)
    assert [reason for reason in certificate.reasons if "schedule: 1f1b" in reason and "backward" in reason]


def _nothing(settings: Settings, ranks: int) -> Any:
    from megagap.planning.gradient_types import GradientTypes

    return GradientTypes(settings, make_layout(settings, ranks))
