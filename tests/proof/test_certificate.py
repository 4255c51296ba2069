"""The certificate that ``--dry-run`` prints."""

import json
import os
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from megagap.config import load_recipe
from megagap.parallel.layout import AXES
from megagap.planning.certificate import LayoutError, certify
from megagap.planning.communication import data_parallel_traffic
from megagap.planning.coverage import coverage_faults, holdings
from megagap.planning.devices import load_device
from megagap.planning.dry_run import dry_run as dry_run_here
from megagap.planning.gradient_types import _reference, _step, gradient_types, reduced
from megagap.planning.simulation import Simulation
from megagap.planning.volume import volume_by_axis
from megagap.training.mesh import make_layout
from tests.parity.cases import ranks_of, write_case
from tests.parity.grid import cases
from tests.recipes import write_recipe
from tests.warm_start import python

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples/recipes"
LARGE = [("gaperon-1b-256", 256), ("llama3-8b-256", 256), ("llama3-70b-1024", 1024), ("llama3-8b-4096", 4096)]


def dry_run(recipe: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [python(), "-m", "megagap.train", str(recipe), "--dry-run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent, env=os.environ | environment)


def test_a_dry_run_prints_one_object_and_writes_nothing(tmp_path):
    recipe = write_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    ran = dry_run(recipe, "--world-size", "4", "--parallel.tp", "2", "--json")
    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stdout.splitlines()
    certificate = json.loads(line)
    assert certificate["holds"] is True and certificate["reasons"] == []
    assert certificate["layout"] == {"pp": 1, "dp": 2, "cp": 1, "tp": 2}
    assert {proof["name"] for proof in certificate["proofs"]} >= {
        "gradients", "collectives", "schedule", "coverage", "groups"}  # fmt: skip
    assert certificate["roles"][0]["memory"]["total"] > 0
    assert certificate["gradient_types"]["only stage"]["model.norm.weight"] == {"tp": "partial", "data": "partial"}
    assert sorted(tmp_path.rglob("*")) == before


def test_every_reason_and_the_nearest_layouts_are_told(tmp_path):
    ran = dry_run(write_recipe(tmp_path), "--world-size", "6", "--parallel.tp", "3", "--parallel.pp", "9", "--json")
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    printed = json.loads(ran.stdout)
    assert printed["holds"] is False
    for setting in ("num_attention_heads", "intermediate_size", "num_hidden_layers", "6 processes"):
        assert any(setting in reason for reason in printed["reasons"]), setting
        assert setting in ran.stderr
    assert printed["nearest"] and "nearest valid layouts:" in ran.stderr
    again = dry_run(
        tmp_path / "recipe.toml", "--world-size", "6", *sum(([f"--{k}", str(v)] for k, v in (
            {"parallel.tp": 3, "parallel.pp": 9} | printed["nearest"][0]).items()), []), "--json")  # fmt: skip
    assert again.returncode == 0, again.stderr


def test_tp_ranks_that_have_no_row_of_the_vocabulary_share_none():
    """As the examined model of a vocabulary of 50,257 on 16 ranks has them, while the ranks share key/value heads."""
    changes = ["parallel.tp=4", "model.num_key_value_heads=2", "model.vocab_size=2", "train.micro_batch_size=1"]
    settings = load_recipe(RECIPES / "code.toml", changes, 4, needs_data=False)
    assert gradient_types(settings, 4).findings == []


@pytest.mark.parametrize(("heads", "cp", "parts"), [(6, 6, 3), (8, 8, 4), (5, 5, 5)])
def test_a_sequence_is_examined_in_parts_that_divide_the_heads_as_cp_does(heads, cp, parts):
    changes = [f"model.num_attention_heads={heads}", "model.num_key_value_heads=1", "model.head_dim=8"]
    changes += [f"parallel.cp={cp}", "parallel.context_mode=alltoall", "train.sequence_length=240"]
    settings = load_recipe(RECIPES / "code.toml", changes, cp, needs_data=False)
    found = gradient_types(settings, cp)
    assert found.findings == [] and found.layout.cp == parts


@pytest.mark.parametrize(
    ("changes", "device", "nearest"),
    [
        (["parallel.tp=3"], "h100", [{"parallel.tp": 4}, {"parallel.tp": 8}]),
        (["parallel.tp=3"], None, [{"parallel.tp": 4}, {"parallel.tp": 2}]),
        (["parallel.dp_replicate=7"], "h100", [{"parallel.dp_replicate": 8}, {"parallel.dp_replicate": 4}]),
    ],
)
def test_the_nearest_layouts_fit_the_device_that_is_named(capsys, changes, device, nearest):
    with pytest.raises(LayoutError):
        dry_run_here(RECIPES / "llama3-70b-1024.toml", changes, 1024, device, True)
    assert json.loads(capsys.readouterr().out)["nearest"][:2] == nearest


def test_a_device_that_is_named_must_have_the_memory():
    recipe = RECIPES / "llama3-8b-256.toml"
    settings = load_recipe(recipe, ["parallel.tp=1", "parallel.pp=1"], 64, needs_data=False)
    device = load_device("h100")
    assert certify(settings, device, 64).holds
    (reason,) = certify(settings, device, 64, device_must_fit=True).reasons
    assert reason.startswith("memory: the only stage takes")


def test_the_world_size_may_come_from_the_environment_alone(tmp_path):
    recipe = write_recipe(tmp_path)
    ran = dry_run(recipe, "--json", WORLD_SIZE="2")
    assert json.loads(ran.stdout)["world_size"] == 2
    ran = dry_run(recipe, WORLD_SIZE="two")
    assert ran.returncode == 2 and "WORLD_SIZE=two in the environment: must be a number" in ran.stderr


def test_a_recipe_that_is_not_there_is_told_without_a_traceback(tmp_path):
    ran = dry_run(tmp_path / "absent.toml")
    assert ran.returncode == 2 and "absent.toml" in ran.stderr and "Traceback" not in ran.stderr


def test_options_of_a_dry_run_are_refused_without_it(tmp_path):
    command = [python(), "-m", "megagap.train", str(write_recipe(tmp_path)), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and "--json applies to --dry-run only" in ran.stderr


@pytest.mark.parametrize(("name", "ranks"), LARGE)
def test_every_element_of_the_large_recipes_has_one_owner(name, ranks):
    settings = load_recipe(RECIPES / f"{name}.toml", [], ranks, needs_data=False)
    layout = make_layout(settings, ranks)
    assert list(coverage_faults(settings, layout, holdings(settings, layout))) == []


HEADLESS = {"model.tie_word_embeddings": True, "model.headless": True}
OLMO2 = {"model.norm_position": "post", "model.qk_norm": True}

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (4, {"parallel.tp": 2}),
    (4, {"parallel.tp": 2, "parallel.sequence_parallel": False}),
    (4, {"parallel.pp": 2, "model.tie_word_embeddings": True}),
    (8, {"parallel.tp": 4, "parallel.pp": 2, "model.num_key_value_heads": 1, "model.vocab_size": 17}),
    (4, {"parallel.tp": 4, "model.num_key_value_heads": 2, "model.attention_bias": True, "model.mlp_bias": True}),
    (3, {"parallel.pp": 3, "parallel.schedule": "gpipe", "model.tie_word_embeddings": True}),
    (2, {"data.document_mask": True}),
    (2, {"parallel.pp": 2, "parallel.vpp": 2}),
    (2, {"parallel.pp": 2, "parallel.schedule": "zb-v", "model.tie_word_embeddings": True}),
    (3, {"parallel.pp": 3, "parallel.schedule": "zb-h1", "train.recompute": "full"}),
    (4, {"parallel.cp": 2, "parallel.tp": 2}),
    (4, {"parallel.cp": 4, "parallel.context_mode": "alltoall", "data.document_mask": True}),
    (4, {"parallel.cp": 2, "parallel.context_mode": "allgather", "parallel.pp": 2, "train.recompute": "full"}),
    (2, {"optim.zero": 0}),
    (4, {"optim.zero": 2, "parallel.cp": 2}),
    (4, {"optim.zero": 3, "parallel.tp": 2, "train.recompute": "full"}),
    (4, {"optim.zero": 3, "parallel.dp_replicate": 2}),
    (4, {"optim.zero": 3, "parallel.pp": 2, "parallel.schedule": "zb-v"}),
    (2, {"parallel.tp": 2, "parallel.sequence_parallel": False, "train.recompute": "full"}),
    (2, {"parallel.tp": 2, "train.recompute": "selective"}),
    (2, {"train.compile": True}),
    (4, {"parallel.tp": 2, "parallel.pp": 2, **HEADLESS}),
    (4, {"parallel.tp": 2, "parallel.sequence_parallel": False, "data.document_mask": True, **HEADLESS}),
    (4, {"parallel.cp": 2, "parallel.tp": 2, **HEADLESS}),
    (4, {"parallel.tp": 4, "model.num_key_value_heads": 2, **OLMO2}),
    (8, {"parallel.tp": 2, "parallel.pp": 2, "train.recompute": "full", "optim.zero": 3, **OLMO2}),
]


def settings_of(ranks: int, changes: dict[str, Any]) -> Any:
    overrides = [f"{name}={str(value).lower()}" for name, value in changes.items()]
    return load_recipe(RECIPES / "code.toml", ["train.micro_batch_size=1", *overrides], ranks, needs_data=False)


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_the_trainers_own_step_is_proven(ranks, changes):
    result = gradient_types(settings_of(ranks, changes), ranks)
    assert result.findings == [] and result.largest_difference < 1e-12 and result.collectives > 0


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_the_volume_by_arithmetic_is_what_the_step_gives_to_collectives(ranks, changes):
    small, layout = reduced(settings_of(ranks, changes), make_layout(settings_of(ranks, changes), ranks))
    simulation = Simulation(layout)
    simulation.run(lambda rank, mesh: _step(small, layout, rank, mesh))
    for holding in holdings(small, layout):
        stage = layout.coordinates(holding.rank)["pp"]
        # Axes with the same members share a group.
        name = {axis: simulation._axes.get(layout.members(axis, holding.rank)) for axis in AXES}
        expected: dict[str, int] = defaultdict(int)
        for axis, volume in volume_by_axis(small, layout, stage).items():
            expected[name[axis]] += volume.given
        for traffic in data_parallel_traffic(small, layout.world_size, stage):
            if traffic.tensors == "parameters" and small.optim.zero < 3:  # gathered after the update, not made here
                expected[name[traffic.axis]] -= traffic.bytes
        given: dict[str, int] = defaultdict(int)
        for axis, members, call in simulation.calls[holding.rank]:
            if "count_targets" not in call.site:  # a scalar
                whole = len(members) if call.operation == "all_gather" else 1
                given[axis] += call.elements * whole * 4  # as in fp32
        assert {axis: size for axis, size in expected.items() if size} == dict(given)


def test_the_reference_is_one_process():
    small, layout = reduced(settings_of(4, {"parallel.tp": 2}), make_layout(settings_of(4, {"parallel.tp": 2}), 4))
    reference = _reference(small, layout)
    assert all(len(values) == reference.shards[name].numel for name, (_, values) in reference.owned.items())


def schedule_proof(ranks: int, *overrides: str) -> Any:
    settings = load_recipe(RECIPES / "code.toml", ["train.micro_batch_size=1", *overrides], ranks, needs_data=False)
    certificate = certify(settings, load_device("h100"), ranks)
    return certificate, next(proof for proof in certificate.proofs if proof.name == "schedule")


def test_the_programs_of_every_batch_size_of_a_ramp_are_proven():
    _, proof = schedule_proof(2, "parallel.pp=2", "train.batch_ramp=[[4096, 12]]")
    assert proof.holds and "microbatches" in proof.examined and " and " in proof.examined.partition("with")[2]


def test_in_a_v_one_rank_is_first_and_last():
    certificate, proof = schedule_proof(3, "parallel.pp=3", "parallel.schedule=zb-v", "model.num_hidden_layers=6",
                                        "train.global_batch_size=9")  # fmt: skip
    assert [role.name for role in certificate.roles] == ["first and last stage", "middle stage"]
    assert certificate.holds and "3 pipeline ranks of 2 virtual stages" in proof.examined


def test_a_compiled_step_is_said_to_be_examined_without_compiling():
    certificate, _ = schedule_proof(2, "train.compile=true")
    assert any("without compiling" in proof.examined for proof in certificate.proofs)


SAMPLE = 20


@pytest.fixture(scope="module")
def sample():
    """Cases of the grid on several ranks."""
    several = [case for case in cases(sample=True)[0] if ranks_of(case) > 1]
    assert len(several) >= SAMPLE
    return several[:: len(several) // SAMPLE][:SAMPLE]


@pytest.mark.parametrize("number", range(SAMPLE))
def test_a_layout_of_the_grid_passes_the_dry_run(number, sample, tmp_path):
    ranks = ranks_of(sample[number])
    settings = load_recipe(write_case(tmp_path, sample[number]), [], ranks)
    assert certify(settings, load_device("h100"), ranks).reasons == []
