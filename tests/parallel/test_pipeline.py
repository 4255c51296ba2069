"""The executor computes the same gradients however virtual stages are placed, several of them per rank included."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from megagap.checkpoint.model import load_model
from megagap.commands.draw_schedule import NAMES
from megagap.config import Settings
from megagap.observe.spans import read_step
from megagap.parallel.actions import Backward, BackwardInput, BackwardWeight, Compute, Forward
from megagap.parallel.pipeline import MOST_BATCHES, _Run
from megagap.parallel.placement import Place, Placement
from megagap.parallel.program import programs_of
from megagap.parallel.schedule import ANY, SCHEDULES, Schedule, gpipe
from megagap.parallel.spans import Spans
from tests.parity.gradients import assembled, gradients, largest_difference
from tests.recipes import write_recipe
from tests.training_run import train_recipe

LAYERS = 5
MICROBATCHES = 4


def interleaved(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """Two stages of two chunks in a loop, four microbatches, written by hand: forwards and backwards alternate."""
    assert (stages, chunks, microbatches) == (2, 2, MICROBATCHES)
    forwards = [Forward(i, chunk) for group in ((0, 1), (2, 3)) for chunk in (0, 1) for i in group]
    backwards = [Backward(i, chunk) for group in ((0, 1), (2, 3)) for chunk in (1, 0) for i in group]
    warmup = 4 - stage
    yield from forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        yield forward
        yield backward
    yield from backwards[len(forwards) - warmup :]


def v_shaped(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """Two stages of two chunks in a V, one microbatch at a time, weight gradients after everything else."""
    assert chunks == 2
    for i in range(microbatches):
        yield Forward(i, 0)
        yield Forward(i, 1)
        yield BackwardInput(i, 1)
        yield BackwardInput(i, 0)
    for chunk in (1, 0):
        yield from (BackwardWeight(i, chunk) for i in range(microbatches))


def v_shaped_whole(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """The same without split backwards, two microbatches at a time."""
    for group in range(0, microbatches, 2):
        yield from (Forward(group + i, chunk) for chunk in range(chunks) for i in range(2))
        yield from (Backward(group + i, chunk) for chunk in reversed(range(chunks)) for i in range(2))


V = Placement.v_shape([1, 1, 2, 1])

PLACED = {
    "one rank, two chunks": (1, 1, Placement.loop([3, 2], chunks=2), gpipe),
    "two ranks, two chunks in a loop": (2, 1, Placement.loop([2, 1, 1, 1], chunks=2), interleaved),
    "two ranks, two chunks in a loop, gpipe": (2, 1, Placement.loop([1, 2, 1, 1], chunks=2), gpipe),
    "two ranks in a V, split backwards": (2, 1, V, v_shaped),
    "two ranks in a V, ends without layers": (2, 1, Placement.v_shape([0, 3, 2, 0]), v_shaped_whole),
    "two ranks in a V, two replicas": (4, 1, V, v_shaped),
    "two ranks in a V, tp 2": (4, 2, V, v_shaped_whole),
    "two ranks in reverse": (2, 1, Placement(Placement.loop([3, 2]).stages, (Place(1, 0), Place(0, 0))), gpipe),
}
"""Processes, tp, placement, schedule."""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, workers, tmp_path_factory):
    """A recipe, and the gradients of one process."""
    folder = tmp_path_factory.mktemp("placed")
    recipe = write_recipe(folder, model=dict(tie_word_embeddings=request.param, num_hidden_layers=LAYERS))
    ((parts, _),) = workers.run(1, gradients, recipe, [])
    return recipe, assembled(parts)


@pytest.mark.parametrize("name", PLACED)
def test_gradients_equal_those_of_one_process_in_every_placement(name, model, workers):
    recipe, expected = model
    processes, tp, placement, schedule = PLACED[name]
    results = workers.run(processes, placed_gradients, recipe, tp, placement, schedule)
    assert largest_difference(results, expected) < 1e-10
    per_rank = processes // placement.ranks
    for process, (parts, _) in enumerate(results):
        held = {int(part.name.split(".")[2]) for part in parts if ".layers." in part.name}
        mine = placement.stages_of(process // per_rank)
        assert held <= {layer for stage in mine for layer in stage.layers}


def placed_gradients(rank, ranks, recipe, tp, placement, order):
    """Of a placement and a schedule that no setting gives."""
    overrides = [f"parallel.pp={placement.ranks}", f"parallel.tp={tp}"]
    return gradients(rank, ranks, recipe, overrides, placement=placement, order=order)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_executed_order_is_that_of_the_list(name, workers, tmp_path):
    """On real processes, as their spans say."""
    recipe = write_recipe(tmp_path, train=dict(steps=2))
    overrides = ["parallel.pp=2", f"parallel.schedule={name}", "run.spans=true", f"run.dir={tmp_path / 'run'}"]
    workers.run(2, train_recipe, recipe, overrides)
    chunks = SCHEDULES[name].default_chunks
    for step in (1, 2):
        for stage, spans in enumerate(read_step(tmp_path / "run", step).ranks):
            executed = [
                NAMES[span.name](span.fields["microbatch"], span.fields["chunk"])
                for span in spans
                if span.name in NAMES
            ]
            assert executed == list(SCHEDULES[name](stage, 2, chunks, MICROBATCHES))


def test_a_schedule_by_hand_is_run_as_it_is_written():
    """So that the runs above are of what they say: what is proven is what was written, with transfers between."""
    placement = Placement.loop([1] * 4, chunks=2)
    first, last = programs_of(Schedule(interleaved, chunks=ANY), placement, MICROBATCHES)
    computed = [action for action in first if isinstance(action, Compute)]
    assert computed[:6] == [Forward(0), Forward(1), Forward(0, 1), Forward(1, 1), Forward(2), Backward(0, 1)]
    assert len(computed) == len([action for action in last if isinstance(action, Compute)]) == 16


def test_1f1b_refuses_several_chunks():
    with pytest.raises(AssertionError, match="chunks per stage, not 2"):
        programs_of(SCHEDULES["1f1b"], Placement.loop([1] * 4, chunks=2), MICROBATCHES)


def train_placed(rank, ranks, recipe, overrides, placement):
    """``train_recipe`` as if the settings gave this placement."""
    with mock.patch.object(Settings, "placement", placement):
        return train_recipe(rank, ranks, recipe, overrides)


@pytest.mark.parametrize("placement", [Placement.loop([2, 1, 1, 1], chunks=2), Placement.v_shape([1, 1, 2, 1])])
def test_a_run_with_several_chunks_per_rank_logs_and_stores_what_one_process_does(placement, workers, tmp_path):
    recipe = write_recipe(
        tmp_path,
        model=dict(tie_word_embeddings=True),
        train=dict(steps=4, evaluate_every=2, evaluate_samples=5),
    )
    (expected,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path / 'one'}"])
    overrides = ["parallel.pp=2", "parallel.schedule=gpipe", f"run.dir={tmp_path / 'placed'}"]
    metrics = workers.run(2, train_placed, recipe, overrides, placement)[0]
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in metrics] == pytest.approx([m[key] for m in expected], rel=1e-5)
    assert metrics[-1]["validation_loss/fr"] == pytest.approx(expected[-1]["validation_loss/fr"], rel=1e-5)
    one, placed = (
        {p.shard.name: p.detach() for p in load_model(tmp_path / run).stage.sharded_parameters()}
        for run in ("one", "placed")
    )
    assert one.keys() == placed.keys()
    for name, weight in one.items():
        torch.testing.assert_close(placed[name], weight, rtol=1e-3, atol=1e-4, msg=name)


class FakeWork:
    """A batch under way: ended once it is waited for, or when it says so."""

    def __init__(self, ended: bool = False) -> None:
        self.ended = ended
        self.waits = 0

    def is_completed(self) -> bool:
        return self.ended

    def wait(self) -> None:
        self.waits += 1
        self.ended = True


@pytest.mark.parametrize(("device", "waited"), [("cuda", [0, 0, 1, 0, 0]), ("cpu", [0, 0, 1, 1, 0])])
def test_on_a_gpu_a_transfer_does_not_wait_for_the_batch_before(device, waited):
    """NCCL's Work of a batch also stands for what it receives, which may be needed much later. Batches that have ended
    are dropped, at most two are left under way, and at the end all are waited for."""
    mesh = mock.Mock(device=torch.device(device), spans=Spans())
    run = _Run(mock.Mock(), mock.Mock(), V, mesh, differentiate=True)
    works = [FakeWork(ended=True), FakeWork(ended=True), FakeWork(), FakeWork(), FakeWork()]
    for work in works:
        run.finish_sends(run.unfinished - 1)
        run.sends.append(([work], [torch.zeros(1)], 1))
        assert len(run.sends) <= MOST_BATCHES
    assert [work.waits for work in works] == waited
    run.finish_sends(0)
    assert not run.sends and all(work.ended for work in works)
