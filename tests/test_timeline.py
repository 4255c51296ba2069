"""What a timeline says of each step, against a walk through the run step by step."""

from functools import partial

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megagap.config import Optim, load_recipe, timeline_of
from megagap.config.learning_rate import learning_rate
from megagap.data.loader import MicrobatchLoader
from megagap.data.samples import TrainingData
from megagap.timeline import Phase, Schedule, Source, Timeline
from tests.recipes import write_recipe

CONSTANT = Optim(lr=1.0, warmup_steps=4, schedule="constant")
COOLDOWN = Optim(lr=1.0, min_lr=0.1, schedule="wsd", cooldown_steps=5)


def walk(phases: list[Phase], batch_sizes: list[tuple[int, int]], steps: int) -> list[tuple[str, int, int, int, int]]:
    """Name of the phase, first sample, samples, first token, tokens of each step: made one after another."""
    made, sample, token, left = [], 0, 0, list(phases)
    within = 0
    for _ in range(steps):
        while len(left) > 1 and within >= (left[0].tokens or 0):
            left, within = left[1:], 0
        batch = [sequences for border, sequences in batch_sizes if border <= token][-1]
        tokens = batch * left[0].sequence_length
        made.append((left[0].name, sample, batch, token, tokens))
        sample, token, within = sample + batch, token + tokens, within + tokens
    return made


phases_of_a_run = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 9)), min_size=1, max_size=4)
ramps = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 7)), max_size=4)


@given(shapes=phases_of_a_run, first=st.integers(1, 7), ramp=ramps, steps=st.integers(1, 60))
def test_every_step_is_what_the_steps_before_it_make_it_in_phases_and_a_batch_ramp(shapes, first, ramp, steps):
    phases = [Phase(str(i), tokens, length) for i, (tokens, length) in enumerate(shapes)]
    batch_sizes = [(0, first), *sorted(dict(ramp).items())]
    timeline = Timeline(phases, batch_sizes)
    made = walk(phases, batch_sizes, steps)
    for step, expected in enumerate(made, 1):
        moment = timeline.at(step)
        assert (moment.phase.name, moment.first_sample, moment.samples, moment.first_token, moment.tokens) == expected
    for phase in phases:
        of_phase = [step for step, (name, *_) in enumerate(made, 1) if name == phase.name]
        if of_phase:
            assert timeline.first_step(phase) == of_phase[0]
            if phase is not phases[-1] and of_phase[-1] < steps:
                assert timeline.last_step(phase) == of_phase[-1]


@given(shapes=phases_of_a_run, first=st.integers(1, 7), ramp=ramps, number=st.integers(0, 5000))
@example(shapes=[(30, 3), (20, 2)], first=2, ramp=[(13, 5)], number=0)
def test_steps_are_found_by_their_samples_and_by_tokens(shapes, first, ramp, number):
    phases = [Phase(str(i), tokens, length) for i, (tokens, length) in enumerate(shapes)]
    timeline = Timeline(phases, [(0, first), *sorted(dict(ramp).items())])
    found = timeline.at(timeline.step_of_sample(number))
    assert found.first_sample <= number < found.consumed_samples
    steps = timeline.steps_for(number)
    assert timeline.at(steps).consumed_tokens >= number
    assert steps == 0 or timeline.at(steps - 1).consumed_tokens < number


def test_a_batch_ramp_grows_at_the_first_step_that_begins_at_its_token_counts_across_phases():
    phases = [Phase("short", 100, 10), Phase("long", None, 20)]
    timeline = Timeline(phases, [(0, 2), (50, 3), (180, 4)], steps=8)
    moments = [timeline.at(step) for step in range(1, 9)]
    # 20, 40 and 60 tokens at two sequences; 90 and 120 at three, where the phase ends; then three and four of 20.
    assert [m.samples for m in moments] == [2, 2, 2, 3, 3, 3, 4, 4]
    assert [m.consumed_tokens for m in moments] == [20, 40, 60, 90, 120, 180, 260, 340]
    assert [m.first_sample for m in moments] == [0, 2, 4, 6, 9, 12, 15, 19]
    assert [m.phase.name for m in moments] == ["short"] * 5 + ["long"] * 3
    assert (timeline.last_step(phases[0]), timeline.last_step(phases[1])) == (5, 8)
    assert timeline.largest_batch == 4 and timeline.sequence_lengths == [10, 20]


def test_going_on_at_another_batch_size_keeps_the_samples_that_were_read_and_misses_none():
    endless = [Phase("all", None, 16)]
    before = Timeline(endless, [(0, 8)])
    at = before.at(50)
    after = Timeline(endless, [(0, 8), (at.consumed_tokens, 12)])
    assert after.at(50).consumed_samples == at.consumed_samples
    assert (after.at(51).first_sample, after.at(51).samples, after.at(52).first_sample) == (400, 12, 412)


def test_a_cooldown_branch_has_its_own_schedule_from_its_own_origin_on():
    long, branch = Schedule(partial(learning_rate, CONSTANT, 10**6)), Schedule(partial(learning_rate, COOLDOWN, 5), 100)
    phases = [Phase("all", None, 16)]
    run = Timeline(phases, [(0, 8)], 10**6, [long])
    cooldown = Timeline(phases, [(0, 8)], 105, [branch, long])
    assert [cooldown.at(step).lr for step in range(1, 101)] == [run.at(step).lr for step in range(1, 101)]
    # The first step of the branch uses the new rate already.
    assert [cooldown.at(step).lr for step in range(101, 106)] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])
    # Data goes on where it stopped.
    assert cooldown.at(101).first_sample == run.at(100).consumed_samples == 800


def test_step_0_is_before_the_first_sample():
    start = Timeline([Phase("a", 10, 5), Phase("b", None, 5)], [(0, 2)]).at(0)
    assert (start.phase.name, start.consumed_samples, start.consumed_tokens) == ("a", 0, 0)


def test_a_step_is_looked_up_without_walking_through_the_run():
    phases = [Phase("first", 10**15, 4096), Phase("then", None, 8192)]
    timeline = Timeline(phases, [(0, 512), (10**12, 1024)])
    step = timeline.steps_for(10**17)
    assert timeline.at(step).phase is phases[1] and step > 10**10
    assert timeline.step_of_sample(timeline.at(step).first_sample) == step


def test_the_loader_reads_every_sample_of_a_ramp_once_in_order_on_every_layout(sources: list[Source]):
    timeline = Timeline([Phase("all", None, 4, tuple(sources))], [(0, 4), (48, 12)], steps=6)
    data = TrainingData(timeline, seed=1)
    sizes = [4, 4, 4, 12, 12, 12]
    read = []
    for workers in (0, 2):
        loaders = [MicrobatchLoader(data, 2, rank, 2, workers=workers) for rank in range(2)]
        for step, size in enumerate(sizes, 1):
            parts = [loader.step(step).tokens for loader in loaders]
            assert [part.shape for part in parts] == [(size // 4, 2, 5)] * 2
            read += [row for part in parts for row in part.flatten(0, 1).tolist()]
        for loader in loaders:
            loader.close()
    assert read == np.tile(data.batch(0, 48), (2, 1)).tolist()


def test_a_recipes_timeline_has_its_steps_samples_and_rates(tmp_path):
    optim = {"lr": 0.5, "schedule": "constant", "warmup_steps": 2}
    settings = load_recipe(write_recipe(tmp_path, train={"steps": 5, "global_batch_size": 8}, optim=optim))
    timeline, length = timeline_of(settings), settings.train.sequence_length
    moments = [timeline.at(step) for step in range(1, 6)]
    assert [m.lr for m in moments] == [0.25, 0.5, 0.5, 0.5, 0.5]
    assert [(m.first_sample, m.consumed_samples) for m in moments] == [(8 * i, 8 * i + 8) for i in range(5)]
    assert [m.consumed_tokens for m in moments] == [8 * length * i for i in range(1, 6)]
    assert timeline.steps == timeline.last_step(timeline.phases[0]) == 5
    assert {m.rope_theta for m in moments} == {settings.model.rope_theta}
