"""``train.compile``: compiled layers train like plain ones, as graphs without breaks, which all layers share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters

from megagap.config import Model
from megagap.model import compiled as compiled_module
from megagap.model.compiled import compile_layers
from megagap.model.init import initialise
from megagap.model.llama import build_whole
from megagap.parallel.schedule import BackwardInput, BackwardWeight, Compute, Forward
from tests.launching import SECONDS
from tests.parity.gradients import assembled, gradients, largest_difference
from tests.parity.test_layouts import layout_overrides
from tests.recipes import write_recipe
from tests.training_run import train_recipe

TOLERANCE = 1e-10

LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, dict(tp=2)),
    "tp2 without sequence parallelism": (2, dict(tp=2, sequence_parallel=False)),
    "tp4, more ranks than key/value heads": (4, dict(tp=4)),
    "tp2 pp2": (4, dict(tp=2, pp=2)),
    "tp2 dp2, document mask": (4, dict(tp=2)),
    "tp2, full recomputation": (2, dict(tp=2, recompute="full")),
    "dp2 zero 3": (2, dict(zero=3)),
    "cp2, ring, document mask": (2, dict(cp=2)),
    "pp2 dp2 zero 3, zb-v, full recomputation": (4, dict(pp=2, schedule="zb-v", zero=3, recompute="full")),
}

QUICK = ("tp2, full recomputation",)
"""What is compiled to code by default, beside tp2 where weight gradients wait; of others, graphs run as they are."""

GRAPHS = ("tp4, more ranks than key/value heads", "dp2 zero 3", "cp2, ring, document mask")
GRAPHS += ("pp2 dp2 zero 3, zb-v, full recomputation",)
"""Those whose graphs run by default: each has what no other here has."""


@pytest.fixture(scope="module")
def model(workers, tmp_path_factory):
    """A recipe, and the gradients of one process that does not compile, with and without a document mask."""
    shape = dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, norm_gain_scale=20.0)
    recipe = write_recipe(tmp_path_factory.mktemp("compile"), model=shape)
    expected = {}
    for masked in (False, True):
        ((parts, _),) = workers.run(1, gradients, recipe, [f"data.document_mask={str(masked).lower()}"])
        expected[masked] = assembled(parts)
    return recipe, expected


@pytest.mark.parametrize("layout", ["tp2", pytest.param("dp2 zero 3", marks=pytest.mark.long)])
def test_every_gradient_of_the_graphs_of_olmo2s_layers_equals_that_of_a_plain_process(layout, workers, tmp_path):
    recipe = write_recipe(tmp_path, model=dict(norm_position="post", qk_norm=True, attention_bias=True))
    ((parts, _),) = workers.run(1, gradients, recipe, [])
    assert largest_difference(run(workers, recipe, layout, "aot_eager"), assembled(parts)) < TOLERANCE


def run(workers, recipe, layout, backend, schedule=None):
    ranks, parallel = LAYOUTS[layout]
    overrides = [*layout_overrides(parallel), f"data.document_mask={str('mask' in layout).lower()}"]
    overrides += ["train.compile=true"]
    nothing = (None, "cpu", torch.float64, None)
    return workers.run(ranks, gradients, recipe, overrides, *nothing, schedule, backend)


@pytest.mark.parametrize(
    "layout",
    [
        name if name in GRAPHS else pytest.param(name, marks=pytest.mark.long)
        for name in LAYOUTS
        if name not in ("one process", *QUICK)
    ],
)
def test_every_gradient_of_the_layers_graphs_equals_that_of_a_plain_process(layout, model, workers):
    recipe, expected = model
    assert largest_difference(run(workers, recipe, layout, "aot_eager"), expected["mask" in layout]) < TOLERANCE


@pytest.mark.parametrize(
    "layout",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS],
)
def test_every_gradient_of_compiled_layers_equals_that_of_a_plain_process(layout, model, workers):
    recipe, expected = model
    assert largest_difference(run(workers, recipe, layout, "inductor"), expected["mask" in layout]) < TOLERANCE


def test_without_an_optimizer_gradients_are_where_autograd_puts_them():
    shape = dict(num_hidden_layers=2, num_key_value_heads=2, vocab_size=61, max_position_embeddings=16)
    model = Model(hidden_size=32, num_attention_heads=4, head_dim=8, intermediate_size=48, attention_bias=True, **shape)
    tokens = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        stage = build_whole(model, torch.float64)
        initialise(stage.sharded_parameters(), model, seed=1)
        if compiled:
            compile_layers([stage], backend="aot_eager")
        for _ in range(2):  # gradients are added up
            stage(tokens, 16).square().sum().backward()
        found.append([parameter.grad for layer in stage.layers for parameter in layer.parameters()])
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)


def split_backwards(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """All forwards, all gradients of inputs, and last those of weights."""
    for action in (Forward, BackwardInput, BackwardWeight):
        yield from (action(microbatch) for microbatch in range(microbatches))


def test_weight_gradients_of_compiled_layers_can_wait(model, workers):
    """Until long after the memory that they are computed from was used for something else."""
    recipe, expected = model
    assert largest_difference(run(workers, recipe, "tp2", "inductor", split_backwards), expected[False]) < TOLERANCE


def graphs_of(rank: int, ranks: int, recipe: Path, overrides: list[str]) -> list[tuple[int, int]]:
    """After each step of a run: how many graphs were made so far, and how often one was broken off."""
    from megagap.training import trainer

    torch._dynamo.reset()
    counters.clear()
    made = []
    step = trainer.train_step

    def counted(*arguments: Any) -> Any:
        result = step(*arguments)
        made.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
        return result

    graphs_only = partial(compile_layers, backend="aot_eager")
    with patch.object(trainer, "train_step", counted), patch.object(trainer, "compile_layers", graphs_only):
        train_recipe(rank, ranks, recipe, overrides)
    return made


def in_phases(folder: Path, lengths: list[int], **changes: Any) -> Path:
    """A recipe of two steps at each length."""
    sources = [{"path": "fr_text_document"}]
    phases = [
        {"name": str(i), "tokens": 2 * 8 * length, "sources": sources, "sequence_length": length}
        for i, length in enumerate(lengths)
    ]
    train = dict(steps=0, compile=True, evaluate_every=3, evaluate_samples=3)
    data = dict(sources=[], phases=phases) | changes.pop("data", {})
    return write_recipe(folder, data=data, train=train, **changes)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layers_train_like_one_plain_process(layout, workers, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    given = [f"data.document_mask={str('mask' in layout).lower()}"]
    recipe = write_recipe(tmp_path, train=dict(steps=6))
    (plain,) = workers.run(1, train_recipe, recipe, [*given, f"run.dir={tmp_path / 'plain'}"])
    given += [*layout_overrides(parallel), "train.compile=true", f"run.dir={tmp_path / 'compiled'}"]
    ours = workers.run(ranks, train_recipe, recipe, given)[0]
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in ours] == pytest.approx([m[key] for m in plain], rel=1e-5)


@pytest.mark.parametrize(("masked", "graphs"), [(False, 2), (True, 3)])
def test_layers_share_graphs_that_are_made_in_the_first_step_of_a_length(masked, graphs, workers, tmp_path):
    """Two, of the first layer and of all others; with document masks a third, after attention. Evaluations make
    none."""
    recipe = in_phases(tmp_path, [16, 32, 16], data=dict(document_mask=masked))
    made = workers.run(2, graphs_of, recipe, ["parallel.tp=2"])
    assert made == [[(graphs, 0)] * 2 + [(2 * graphs, 0)] * 4] * 2


def test_a_run_may_have_more_lengths_than_torch_would_compile_a_function_for(workers, tmp_path):
    lengths = list(range(8, 28, 2))
    ((*_, last),) = workers.run(1, graphs_of, in_phases(tmp_path, lengths, model=dict(num_hidden_layers=2)), [])
    assert last == (2 * len(lengths), 0)


def test_compiled_runs_learn_the_same_and_resume_bit_for_bit(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=6, micro_batch_size=4, sequence_length=32))
    (plain,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path / 'plain'}"])
    compiled = ["train.compile=true", f"run.dir={tmp_path / 'compiled'}"]
    (whole,) = workers.run(1, train_recipe, recipe, compiled)
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in whole] == pytest.approx([m[key] for m in plain], rel=1e-5)
    parts = ["train.compile=true", f"run.dir={tmp_path / 'parts'}"]
    workers.run(1, train_recipe, recipe, [*parts, "run.stop_after=3"])
    (resumed,) = workers.run(1, train_recipe, recipe, parts)
    assert [(m["loss"], m["grad_norm"]) for m in resumed] == [(m["loss"], m["grad_norm"]) for m in whole]


def test_bf16_layers_compile(workers, tmp_path):
    """With sequences that attention computes in blocks, which are part of the graph."""
    recipe = write_recipe(
        tmp_path, model=dict(num_hidden_layers=2), train=dict(steps=4, sequence_length=160, precision="bf16-mixed")
    )
    (plain,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path / 'plain'}"])
    (ours,) = workers.run(1, train_recipe, recipe, ["train.compile=true", f"run.dir={tmp_path / 'compiled'}"])
    assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in plain], rel=2e-3)


@pytest.mark.skipif(not hasattr(torch.compiler.config, "cache_key_tag"), reason="before torch 2.7")
def test_code_that_torch_keeps_on_disk_is_that_of_the_same_sources(monkeypatch):
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    tags = set()
    for digest in ("one", "one", "other"):
        monkeypatch.setattr(compiled_module, "sources_digest", lambda digest=digest: digest)
        compile_layers([])
        tags.add(torch.compiler.config.cache_key_tag)
    assert len(tags) == 2 and all("megagap" in tag for tag in tags)


COMPILERS = {
    "none": ("", "No working C++ compiler found"),
    "without Python's headers": (
        """#!/bin/sh
case "$*" in *--version*) echo "g++ 13.0.0"; exit 0;; esac
echo "header.hpp:1:10: fatal error: Python.h: No such file or directory" >&2; exit 1
""",
        "header.hpp:1:10: fatal error: Python.h: No such file or directory",
    ),
}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_run_that_torch_cannot_compile_says_why_before_it_starts(compiler, tmp_path):
    script, reason = COMPILERS[compiler]
    program = tmp_path / "compiler"
    if script:
        program.write_text(script)
        program.chmod(0o700)
    recipe = write_recipe(tmp_path, train=dict(compile=True))
    environment = {"CXX": str(program), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "megagap.train", recipe],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"compile error: train.compile = true: torch cannot compile on this machine: {reason}" in done.stderr
    assert "or set train.compile = false" in done.stderr
    assert "from scratch" not in done.stderr
