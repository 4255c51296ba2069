"""The grid of layouts computes what one process does: a pairwise sample always, the full grid by ``-m long``."""

from itertools import cycle

import pytest

from megagap.config import load_recipe
from megagap.parallel.cross_entropy import IGNORED_TARGET
from megagap.process.rendezvous import Process
from megagap.training.datasets import training_data
from megagap.training.mesh import make_mesh
from megagap.training.step import targets_of
from megagap.training.trainer import make_loader
from tests.parity.cases import layout_name, ranks_of, simplest, write_case
from tests.parity.comparison import Comparison, Trajectory, one_process
from tests.parity.grid import cases, dimensions, full_grid, layout_of

SAMPLE, IMPOSSIBLE = cases(sample=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE, ids=layout_name)
def test_gradients_of_a_sample_of_all_pairs_equal_those_of_one_process(case, workers, tmp_path):
    assert Comparison(workers).check(write_case(tmp_path, case), ranks_of(case), trains=False) is None


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE[::5], ids=layout_name)
def test_a_part_of_the_sample_trains_like_one_process(case, workers, tmp_path):
    """Its gradients are compared above."""
    recipe = write_case(tmp_path, case | {"train.steps": 4})
    assert Comparison(workers).check(recipe, ranks_of(case), differentiates=False) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "precision"),
    [*zip(SAMPLE[1::6], cycle(["bf16-mixed", "bf16-pure", "fp16-mixed"]), strict=False)],
    ids=lambda value: value if isinstance(value, str) else layout_name(value),
)
def test_sixteen_bits_stay_within_their_envelope(case, precision, workers, tmp_path):
    recipe = write_case(tmp_path, case | {"train.steps": 4, "train.precision": precision})
    assert Comparison(workers).check(recipe, ranks_of(case), differentiates=False) is None


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_the_full_grid_equals_one_process(workers, tmp_path):
    """In fp32 too, and over more steps."""
    grid = full_grid()
    assert len(grid) >= 60
    comparison, findings = Comparison(workers, in_fp32_too=True), []
    for number, case in enumerate(grid):
        recipe = write_case(tmp_path / str(number), case | {"train.steps": 8})
        if (finding := comparison.check(recipe, ranks_of(case))) is not None:
            findings.append((layout_name(case), finding))
        print(f"{number + 1}/{len(grid)} {layout_name(case)}: {finding or 'equal'}", flush=True)
    assert not findings


def test_the_sample_has_every_value_and_leaves_out_only_what_does_not_fit():
    for name, values in dimensions(sample=True).items():
        if name != "masks":
            assert {case[name] for case in SAMPLE} == set(values), name
    mechanisms = ("parallel.", "optim.", "train.", "dp", "stages")
    for pair in IMPOSSIBLE:  # too many ranks together, or a value that needs another of the same mechanism
        assert all(name.startswith(mechanisms) for name, _ in pair)
    assert len({layout_of(case) for case in SAMPLE}) >= 15


def test_in_the_sample_a_data_rank_has_nothing_but_masked_targets_while_another_has_some(workers, tmp_path):
    of_the_data = ("dp", "microbatches", "documents", "data.document_mask", "train.sequence_length", "model.vocab_size")
    masked = [case for case in SAMPLE if "every other" in case["documents"] and case["dp"] > 1]
    steps = []
    for number, case in enumerate(masked):  # the other ranks of a data rank have the same samples
        alone = simplest() | {name: case[name] for name in of_the_data}
        recipe = write_case(tmp_path / str(number), alone)
        steps += zip(*workers.run(case["dp"], targets_by_step, recipe, 4), strict=True)
    assert any(0 in counts and any(counts) for counts in steps)


def targets_by_step(rank, ranks, recipe, steps):
    """How many targets this rank has in each step."""
    settings = load_recipe(recipe, [], ranks)
    mesh = make_mesh(settings, Process(rank, ranks, rank, ranks), "cpu")
    with make_loader(settings, mesh, training_data(settings)) as loader:
        batches = [loader.step(step) for step in range(1, steps + 1)]
    return [int((targets_of(batch.tokens, batch.positions) != IGNORED_TARGET).sum()) for batch in batches]


def test_the_noise_of_one_process_is_small_and_training_that_differs_by_more_is_found(workers, tmp_path, monkeypatch):
    case = simplest() | {"microbatches": 3, "model.num_hidden_layers": 3}
    recipe = write_case(tmp_path, case)
    comparison = Comparison(workers)
    expected = comparison.trajectory(one_process(recipe), 1)
    noise = comparison.noise(recipe, expected, 0.01)
    assert 0 < max(noise.values()) < 1e-5
    assert expected.difference(expected, 0.01) == dict.fromkeys(noise, 0.0)

    wrong = Trajectory(expected.losses, expected.norms * (1 + 5e-5), expected.weights)
    monkeypatch.setattr(comparison, "trajectory", lambda path, ranks: wrong if path == recipe else expected)
    finding = comparison.check(recipe, 1)
    assert finding.kind == "training" and "gradient norms by 5e-05" in finding.text
