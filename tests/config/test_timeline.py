"""Tokens and phases of a recipe become whole steps."""

import pytest

from megagap.config import load_recipe, timeline_of
from tests.config.good import faults_of

WEB, CODE = {"path": "web_text_document", "weight": 0.7}, {"path": "code_text_document", "weight": 0.3}


def in_phases(*phases, **more):
    return {"data__sources": [], "data__phases": list(phases), "train__steps": 0} | more


def phase(name, steps, **more):
    """Of so many steps of the good recipe."""
    return {"name": name, "tokens": steps * 8 * 64, "sources": [WEB, CODE]} | more


def test_tokens_become_whole_steps(recipe):
    settings = load_recipe(recipe(train__steps=0, train__tokens=8 * 64 * 3 + 1))
    assert settings.train.steps == 4


def test_phases_make_the_length_of_the_run_and_end_at_whole_steps(recipe):
    phases = [phase("a", 3, tokens=2 * 512 + 1), phase("b", 4, sequence_length=128, rope_theta=5e4)]
    settings = load_recipe(recipe(**in_phases(*phases)))
    assert settings.train.steps == 3 + 2
    assert [(p.sequence_length, p.rope_theta) for p in settings.data.phases] == [(64, 10000.0), (128, 50000.0)]
    assert settings.data.phases[0].sources[0].name == "web"
    timeline = timeline_of(settings)
    assert [timeline.at(step).phase.name for step in (1, 3, 4, 5, 6)] == ["a", "a", "b", "b", "b"]
    assert [timeline.last_step(phase) for phase in timeline.phases] == [3, 5]
    assert [timeline.at(step).consumed_tokens for step in (0, 1, 3, 4, 5)] == [0, 512, 1536, 2560, 3584]


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (1536, 3), (1537, 4), (2561, 5)])
def test_tokens_of_a_run_in_phases_become_steps_of_their_lengths(recipe, tokens, steps):
    phases = [phase("a", 3), phase("b", 4, sequence_length=128)]
    assert load_recipe(recipe(**in_phases(*phases, train__tokens=tokens))).train.steps == steps


@pytest.mark.parametrize(
    ("phases", "more", "complaint"),
    [
        ([phase("a", 3)], {"train__steps": 4}, "end after 3 steps, but the run has 4"),
        ([phase("a", 3)], {"train__tokens": 3 * 512 + 1}, "end after 3 steps, but the run has 4"),
        ([phase("a", 3)], {"data__sources": [WEB]}, "set either data.sources or data.phases, not both"),
        ([phase("a", 3)], {"data__order": "megatron"}, "does not support data.phases"),
        ([phase("a", 3), phase("a", 3)], {}, "is the name of two phases"),
        ([phase("a", 3, sources=[])], {}, "data.phases[0].sources"),
        ([phase("a", 3, sources=[WEB, WEB])], {}, "data.phases[0].sources = 'web'  is the name of two sources"),
        ([phase("a", 3, sources=[{"path": []}])], {}, "has a source whose path is an empty list"),
        ([phase("a", 3), phase("b", 3, sources=[{"path": "x/web"}, WEB])], {}, "is the name of two sources"),
        ([phase("a", 3), phase("b", 3, sources=[{"path": "x/web"}])], {}, "names other data than in an earlier phase"),
        ([phase("a", 3, sequence_length=4096)], {}, "data.phases[0].sequence_length = 4096"),
        ([phase("a", 3, sequence_length=63)], {"parallel__tp": 2}, "data.phases[0].sequence_length = 63"),
        ([phase("a", 0)], {}, "data.phases[0].tokens = 0"),
        ([phase("a", 3, tokes=1)], {}, "did you mean data.phases[0].tokens?"),
        ([phase("a", 3)], {"optim__warmup_steps": 4}, "exceeds the run's 3 steps"),
    ],
)
def test_phases_that_are_no_plan_are_refused(recipe, phases, more, complaint):
    assert complaint in faults_of(recipe(**in_phases(*phases, **more)))
