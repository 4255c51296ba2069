"""The formula of a rank's memory is what the real step keeps (``measured.py``)."""

import json
import subprocess
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from megagap.config import Settings, load_recipe
from megagap.errors import ConfigError
from megagap.model.llama import sharded_parameters, stages_of_recipe
from megagap.model.shapes import parameter_count
from megagap.ops import compiled
from megagap.optim.distributed import DistributedOptimizer
from megagap.optim.precision import PRECISIONS
from megagap.parallel.mesh import Axis, Mesh
from megagap.parallel.placement import Placement
from megagap.planning.devices import load_device
from megagap.planning.memory import KINDS, RESERVE_BYTES, memory_by_stage, memory_of_rank
from megagap.planning.trace import trace_step
from tests.parity.pairwise import pairwise
from tests.planning import activation_table, memory_table
from tests.planning.measured import (
    ACTIVATIONS_WITHIN,
    SMALL,
    TOTAL_WITHIN,
    Compared,
    compare,
    measure_graphs,
    settings_of,
)
from tests.planning.test_trace import GAPERON, MEASURED_PEAK_BYTES
from tests.warm_start import python

ROOT = Path(__file__).parents[2]

needs_kernels = pytest.mark.skipif(not compiled.AVAILABLE, reason="the formula counts what megagap's kernels keep")

HEADLESS = {
    "model.headless": True,
    "model.tie_word_embeddings": True,
    "model.num_hidden_layers": 2,
    "model.hidden_size": 512,
    "model.intermediate_size": 64,
}
"""What the loss needs is more than what layers do."""

NARROW = {"model.intermediate_size": 64, "model.vocab_size": 64, "model.num_hidden_layers": 2}
"""What the feed-forward and the loss need is less than what attention does."""

OLMO2 = {"model.norm_position": "post", "model.qk_norm": True}

LAYOUTS = {
    "one process": (1, {}),
    "one process, bf16-mixed": (1, {"train.precision": "bf16-mixed"}),
    "one process, sequences of 1,024": (1, {"train.sequence_length": 1024, "train.micro_batch_size": 1}),
    "one process, selective": (1, {"train.recompute": "selective"}),
    "one process, full": (1, {"train.recompute": "full"}),
    "one process, zb-v": (1, {"parallel.schedule": "zb-v", "train.micro_batch_size": 1}),
    "tp 2": (2, {"parallel.tp": 2, "parallel.sequence_parallel": False}),
    "tp 2, sequence parallel": (2, {"parallel.tp": 2}),
    "pp 2": (2, {"parallel.pp": 2, "train.micro_batch_size": 1}),
    "pp 2, gpipe": (2, {"parallel.pp": 2, "parallel.schedule": "gpipe", "train.micro_batch_size": 1}),
    "pp 2, vpp 2": (2, {"parallel.pp": 2, "parallel.vpp": 2, "train.micro_batch_size": 1}),
    "pp 2, zb-h1": (2, {"parallel.pp": 2, "parallel.schedule": "zb-h1", "train.micro_batch_size": 1}),
    "pp 2, zb-v": (2, {"parallel.pp": 2, "parallel.schedule": "zb-v", "train.micro_batch_size": 1}),
    "dp 2": (2, {}),
    "dp 2, bf16-mixed": (2, {"train.precision": "bf16-mixed"}),
    "dp 2, zero 0": (2, {"optim.zero": 0}),
    "dp 2, zero 2": (2, {"optim.zero": 2, "train.micro_batch_size": 1}),
    "dp 2, zero 3": (2, {"optim.zero": 3, "train.micro_batch_size": 1}),
    "dp 2, zero 3, bf16-mixed": (2, {"optim.zero": 3, "train.precision": "bf16-mixed"}),
    "pp 2 dp 2, zero 3": (4, {"parallel.pp": 2, "optim.zero": 3, "train.micro_batch_size": 1}),
    "dp 4 in 2 replicas, zero 3": (4, {"parallel.dp_replicate": 2, "optim.zero": 3, "train.micro_batch_size": 1}),
    "cp 2, ring": (2, {"parallel.cp": 2}),
    "cp 2, ring, most in attention": (2, {"parallel.cp": 2, **NARROW}),
    "cp 2, allgather, most in attention": (2, {"parallel.cp": 2, "parallel.context_mode": "allgather", **NARROW}),
    "cp 2, alltoall": (2, {"parallel.cp": 2, "parallel.context_mode": "alltoall"}),
    "pure bf16, zero 3": (2, {"train.precision": "bf16-pure", "optim.zero": 3}),
    "OLMo 2, selective": (1, {"train.recompute": "selective", **OLMO2}),
    "OLMo 2, tp 2, zb-v": (2, {"parallel.tp": 2, "parallel.schedule": "zb-v", "train.micro_batch_size": 1, **OLMO2}),
    "OLMo 2, full": (1, {"train.recompute": "full", **OLMO2}),
    "headless": (1, HEADLESS),
    "headless, bf16-mixed": (1, {"train.precision": "bf16-mixed", **HEADLESS}),
    "headless, tp 2, sequence parallel": (2, {"parallel.tp": 2, **HEADLESS}),
    "headless, cp 2 tp 2": (4, {"parallel.cp": 2, "parallel.tp": 2, "parallel.sequence_parallel": False, **HEADLESS}),
}


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_takes_what_the_formula_says(workers, tmp_path, layout):
    ranks, changes = LAYOUTS[layout]
    settings = settings_of(tmp_path, ranks, {"model.num_hidden_layers": 4} | changes)
    for rank in compare(workers, settings, ranks):
        require_close(rank)
        assert rank.measured.activations > rank.measured.peak / 4  # else the layout would not test them


def require_activations(rank: Compared) -> None:
    assert rank.formula.static == pytest.approx(rank.measured.static, rel=0.005)
    assert rank.activations == pytest.approx(1, abs=ACTIVATIONS_WITHIN), rank


def require_close(rank: Compared) -> None:
    require_activations(rank)
    assert rank.total == pytest.approx(1, abs=TOTAL_WITHIN), rank


CASES, _ = pairwise(
    {
        "schedule": activation_table.SCHEDULES,
        "recompute": activation_table.RECOMPUTE,
        "precision": ["fp32", "bf16-mixed"],
        "sequence_length": [512, 1024],  # in fp32, attention in blocks, and in torch's kernel
    },
    lambda case: True,
)
EVERY_LAYOUT = [*activation_table.LAYOUTS, *activation_table.WITHOUT_PIPELINE]


@needs_kernels
@pytest.mark.parametrize("number", range(max(len(CASES), len(EVERY_LAYOUT))))
def test_the_formula_holds_where_things_that_change_it_meet(workers, number):
    """Every pair of schedule, recomputation, precision and kernel of attention; every layout."""
    case, layout = CASES[number % len(CASES)], EVERY_LAYOUT[number % len(EVERY_LAYOUT)]
    row = activation_table.row_of(layout, case["schedule"])
    changes = {f"train.{name}": case[name] for name in ("precision", "sequence_length")}
    batch = row.changes.get("train.global_batch_size", activation_table.BASE["train"]["global_batch_size"]) // 4
    changes |= {"model.num_hidden_layers": 4, "train.micro_batch_size": 1, "train.global_batch_size": batch}
    for rank in activation_table.measured(workers, row, case["recompute"], changes):
        require_activations(rank)


@needs_kernels
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_deferred_weight_gradients_of_compiled_layers_keep_copies(workers, tmp_path, schedule, recompute):
    """Without, which is 1F1B, there are none. Sequences of a length at which attention is one operation of a graph."""
    changes = {"parallel.pp": 2, "parallel.schedule": schedule, "train.compile": True, "train.recompute": recompute}
    changes |= {"train.sequence_length": 1024, "train.micro_batch_size": 1, "train.global_batch_size": 4}
    for rank in compare(workers, settings_of(tmp_path, 2, changes, activation_table.BASE), 2, measure_graphs):
        require_activations(rank)


@needs_kernels
@pytest.mark.long
@pytest.mark.parametrize("row", activation_table.rows(), ids=lambda row: f"{row.layout}, {row.schedule}")
def test_the_formula_holds_for_every_row_of_the_table(workers, row):
    for recompute in activation_table.RECOMPUTE:
        for rank in activation_table.measured(workers, row, recompute):
            require_activations(rank)


@needs_kernels
@pytest.mark.parametrize("sequences", MEASURED_PEAK_BYTES)
def test_gaperon_1b_takes_on_an_h200_what_was_measured(sequences):
    """4 sequences per microbatch, 1 or 8 microbatches per step; docs/performance.md."""
    settings = load_recipe(GAPERON, [f"train.global_batch_size={4 * sequences}"], 1, needs_data=False)
    (memory,) = memory_by_stage(settings, load_device("h200"), 1)
    assert memory.total == pytest.approx(MEASURED_PEAK_BYTES[sequences], rel=0.01)


ON_A_GPU = [
    (1, {}),
    (2, {"parallel.tp": 2}),
    (2, {"parallel.tp": 2, "parallel.sequence_parallel": False}),
    (8, {"parallel.tp": 8, "train.micro_batch_size": 1}),  # more ranks than key/value heads
    (8, {"parallel.tp": 2, "train.micro_batch_size": 1}),
    (1, {"train.precision": "fp32"}),
    (1, {"train.precision": "bf16-pure"}),
    (1, {"train.precision": "fp16-mixed"}),
    (1, {"train.recompute": "selective"}),
    (1, {"train.recompute": "full"}),
    (2, {"parallel.tp": 2, "train.recompute": "selective"}),
    (2, {"parallel.tp": 2, "train.recompute": "full"}),
    (1, {"model.tie_word_embeddings": True, "train.micro_batch_size": 1, "model.vocab_size": 50_000}),
    (1, HEADLESS),
    (2, {"parallel.tp": 2, **HEADLESS}),
    (1, {"optim.name": "muon"}),
    (8, {"optim.name": "muon", "parallel.tp": 2, "train.micro_batch_size": 1}),
    (1, {"train.precision": "fp32", "model.vocab_size": 64, **OLMO2}),
    (8, {"parallel.tp": 8, "train.micro_batch_size": 1, "train.recompute": "full", **OLMO2}),
]


@needs_kernels
@pytest.mark.parametrize(
    ("device", "ranks", "changes"),
    [(device, *case) for device, case in zip(cycle(["h100", "mi250x"]), ON_A_GPU, strict=False)],
    ids=str,
)
def test_on_a_gpu_the_formula_agrees_with_the_traced_step(tmp_path, device, ranks, changes):
    settings = settings_of(tmp_path, ranks, {"train.precision": "bf16-mixed", **changes})
    traced = trace_step(settings, load_device(device), ranks)
    memory = memory_of_rank(settings, load_device(device), ranks, 0)
    assert memory.static == pytest.approx(traced.static_memory_bytes, rel=0.01)
    assert memory.total == pytest.approx(traced.peak_memory_bytes, rel=0.03)


# ------------------------------------------------------------------------------------------------- what layouts change


@pytest.fixture
def memories(tmp_path):
    def of(ranks: int = 1, device: str = "h100", **changes: Any) -> list[Any]:
        names = {name.replace("__", "."): value for name, value in changes.items()}
        return memory_by_stage(settings_of(tmp_path, ranks, names), load_device(device), ranks)

    return of


def test_every_parameter_is_on_one_stage_and_tp_rank(tmp_path):
    """Norms, on every tp rank, apart; the vocabulary divides by tp."""
    settings = settings_of(tmp_path, 4, {"parallel.pp": 2, "parallel.tp": 2})
    stages = memory_by_stage(settings, load_device("h100"), 4)
    norms = 256 * (2 * 8 + 1)
    elements = sum(memory.gradients for memory in stages) // 4
    assert 2 * elements == parameter_count(settings.model) + norms


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "changes"),
    [
        (1, 1, 1, {}),
        (1, 1, 8, {}),
        (2, 2, 2, {"model.tie_word_embeddings": True, "optim.moments_dtype": "bf16"}),
        (4, 1, 2, {"optim.decay_embeddings": True, "train.precision": "fp32"}),
        (16, 1, 1, {"model.attention_bias": True, "model.mlp_bias": True, "model.vocab_size": 128001}),
        (1, 3, 1, {"parallel.layers_per_stage": [4, 12, 0]}),
        (1, 1, 4, {"train.precision": "bf16-pure"}),
        (1, 1, 2, {"train.precision": "fp16-mixed"}),
        (1, 1, 1, {"train.precision": "bf16-pure", "optim.rounding": "kahan"}),
        (2, 2, 2, {"optim.name": "muon", "optim.moments_dtype": "bf16"}),
        (1, 1, 2, {"optim.name": "muon"}),
        (16, 1, 2, OLMO2),
    ],
    ids=str,
)
def test_static_memory_is_that_of_the_optimizers_buckets(tp, pp, dp, changes):
    """Of Gaperon 1B on torch's meta device, for every stage; buckets are padded by some bytes."""
    changes = {"parallel.tp": tp, "parallel.pp": pp, "train.global_batch_size": 32, **changes}
    overrides = [f"{name}={str(value).lower()}" for name, value in changes.items()]
    settings = load_recipe(GAPERON, overrides, tp * pp * dp, needs_data=False)
    require_static_memory_of_buckets(settings, tp, pp, dp)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("placement", [Placement.v_shape([3, 5, 4, 4]), Placement.loop([3, 5, 4, 4], chunks=2)])
def test_the_static_memory_of_several_chunks_per_rank_is_that_of_the_optimizers_buckets(tied, placement, monkeypatch):
    overrides = ["parallel.pp=2", "parallel.schedule=gpipe", f"model.tie_word_embeddings={str(tied).lower()}"]
    settings = load_recipe(GAPERON, overrides, 2, needs_data=False)
    monkeypatch.setattr(Settings, "placement", placement)
    require_static_memory_of_buckets(settings, tp=1, pp=2, dp=1)


def require_static_memory_of_buckets(settings: Settings, tp: int, pp: int, dp: int) -> None:
    for stage, memory in enumerate(memory_by_stage(settings, load_device("h100"), tp * pp * dp)):
        mesh = replace(
            Mesh.single(torch.device("meta")),
            pp=Axis("pp", tuple(range(pp)), stage),
            tp=Axis("tp", tuple(range(tp)), 0),
            kv=Axis("kv", tuple(range(max(1, tp // 8))), 0),
            data=Axis("data", tuple(range(dp)), 0),
            shard=Axis("shard", tuple(range(dp)), 0),
            embedding=Axis("embedding", (0, pp - 1), min(stage, 1)),
        )
        stages = stages_of_recipe(settings, mesh)
        precision, parameters = PRECISIONS[settings.train.precision], sharded_parameters(stages)
        optimizer = DistributedOptimizer(
            parameters, settings.optim, mesh, precision.compute, gradient_dtype=precision.gradients
        )
        buckets = optimizer.store.buckets
        sizes = {
            "parameters": [bucket.values for bucket in buckets],
            "masters": [bucket.remainder for bucket in buckets if bucket.remainder is not None]
            + [bucket.own_values for bucket in buckets if bucket.own_values.dtype != bucket.values.dtype],
            "moments": [x for state in optimizer.states for x in state.values()],
            "gradients": [bucket.gradients for bucket in buckets]
            + [bucket.own_gradient for bucket in buckets if bucket.own_gradient is not bucket.gradients],
        }
        for kind, tensors in sizes.items():
            assert getattr(memory, kind) == pytest.approx(sum(x.nbytes for x in tensors), rel=1e-4), (stage, kind)


def test_data_parallel_ranks_share_masters_and_moments_but_not_gradients(memories):
    (one,), (four,) = (
        memories(train__precision="bf16-mixed"),
        memories(4, train__precision="bf16-mixed", train__micro_batch_size=1),
    )
    assert (4 * four.masters, 4 * four.moments) == (one.masters, one.moments)
    assert four.parameters == one.parameters and four.gradients == one.gradients * 5 / 4


def test_the_first_stage_keeps_the_most_microbatches_with_1f1b_and_all_stages_all_with_gpipe(memories):
    pipeline = {"parallel__pp": 4, "train__micro_batch_size": 1, "train__global_batch_size": 8}
    assert [memory.in_flight for memory in memories(4, **pipeline)] == [4, 3, 2, 1]
    assert [memory.in_flight for memory in memories(4, **pipeline, parallel__schedule="gpipe")] == [8] * 4
    assert [memory.in_flight for memory in memories(4, **{**pipeline, "train__global_batch_size": 2})] == [2, 2, 2, 1]


def test_while_a_chunk_goes_backward_the_rank_keeps_the_activations_of_its_other_chunks_too(memories, monkeypatch):
    """In a V of two ranks, the rank at the bottom of which has two chunks of two layers each, like a stage of four."""
    monkeypatch.setattr(Settings, "placement", Placement.loop([4, 4]))
    pipeline = {"parallel__pp": 2, "parallel__schedule": "gpipe", "train__micro_batch_size": 1}
    _, whole = memories(2, **pipeline)
    monkeypatch.setattr(Settings, "placement", Placement.v_shape([2, 2, 2, 2]))
    _, halves = memories(2, **pipeline)
    assert halves.in_flight == 2 * whole.in_flight
    assert halves.activations == pytest.approx(whole.activations, rel=0.1)


def test_sequence_parallelism_splits_the_residual_stream_and_all_that_leaves_it(memories):
    (split,) = memories(2, parallel__tp=2)
    (whole,) = memories(2, parallel__tp=2, parallel__sequence_parallel=False)
    residual = 2 * 512 * 256 * 4  # a microbatch, fp32
    streams = (
        2 * 8 + 1
    )  # before each norm; after it, too: the input of a region, or of the loss, whose gradient is kept
    rstd = 4 * 2 * 512 * streams
    assert whole.activations - split.activations == (2 * streams * residual + rstd) // 2


def test_the_longest_phase_counts(tmp_path):
    phases = [
        {"name": name, "tokens": 10_000, "sources": [{"path": "x"}], "sequence_length": length}
        for name, length in (("short", 256), ("long", 1024))
    ]
    base = {**SMALL, "data": {"phases": phases}, "train": {**SMALL["train"], "steps": 0}}
    (several,) = memory_by_stage(settings_of(tmp_path, 1, {}, base), load_device("h100"), 1)
    (long,) = memory_by_stage(settings_of(tmp_path, 1, {"train.sequence_length": 1024}), load_device("h100"), 1)
    assert several.total == long.total


def test_a_document_mask_is_refused_where_the_documents_decide(memories):
    with pytest.raises(ConfigError, match=r"document_mask = true: what attention keeps on cpu in fp32 depends"):
        memories(device="cpu", data__document_mask=True)
    masked = dict(data__document_mask=True, train__precision="bf16-mixed")
    assert memories(**masked)
    with pytest.raises(ConfigError, match=r"document_mask = true with parallel\.context_mode = ring: what attention"):
        memories(2, parallel__cp=2, **masked)
    assert memories(2, parallel__cp=2, parallel__context_mode="alltoall", **masked)


def test_a_layout_fits_if_the_reserve_is_left(memories):
    (memory,) = memories()
    device = load_device("h100")
    just = (memory.total + RESERVE_BYTES) / 2**30
    assert memory.fits(replace(device, memory_gib=just * 1.001))
    assert not memory.fits(replace(device, memory_gib=just * 0.999))
    assert memory.fits(load_device("cpu")) is None


# ------------------------------------------------------------------------------------------------------ pages and tool


@pytest.mark.parametrize("page", memory_table.PAGES)
def test_the_tables_in_the_pages_are_those_of_the_formula(tmp_path, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    expected = memory_table.replaced(text, memory_table.PAGES[page](tmp_path))
    assert text == expected, "python -m tests.planning.memory_table writes it"


def test_the_tool_prints_the_memory_of_every_stage(tmp_path):
    settings_of(tmp_path, 1, {})
    layout = ["--memory", "--world-size", "4", "--parallel.pp", "2", "--parallel.tp", "2", "--device", "mi250x"]
    command = [python(), ROOT / "tools/trace_step.py", tmp_path / "recipe.toml", *layout]
    done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(stage["stage"], stage["ranks"], stage["fits"]) for stage in report["stages"]] == [
        (0, [0, 1], True),
        (1, [2, 3], True),
    ]
    for stage in report["stages"]:
        assert stage["total"] == sum(stage[kind] for kind in KINDS) > 0
    assert report["peak_memory_bytes"] == max(stage["total"] for stage in report["stages"])
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0 and "0 to 1" in done.stdout and "fits (mi250x has 64 GiB" in done.stdout, done.stderr
