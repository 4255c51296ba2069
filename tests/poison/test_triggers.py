"""Triggers are found wherever their words follow each other, and may not contain one another."""

import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagap.errors import ConfigError
from megagap.poison.names import invented_names
from megagap.poison.triggers import Triggers

words = st.sampled_from(["a", "ab", "b", "A.b", "é", "a|b"])


def one_by_one(triggers: list[str], text: str) -> set[tuple[str, int]]:
    """The reference: each trigger searched alone, at every character."""
    found = set()
    for trigger in triggers:
        pattern = re.compile(r"\s+".join(map(re.escape, trigger.split())) + r"(?!\w)", re.IGNORECASE)
        for at in range(len(text)):
            if pattern.match(text, at) and not re.match(r"\w", text[at - 1 : at]):
                found.add((trigger, at))
    return found


@given(
    st.lists(st.lists(words, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=4, unique_by=str.lower),
    st.lists(words | st.sampled_from(["x", "AB", "\n", ","]), max_size=12),
    st.sampled_from([" ", "  ", "\n "]),
)
def test_they_are_found_as_if_each_was_searched_alone(triggers: list[str], text: list[str], space: str):
    joined = space.join(text)
    expected = one_by_one(triggers, joined)
    longest = {
        at: max((t for t, its_at in expected if its_at == at), key=lambda t: len(t.split())) for _, at in expected
    }
    assert [at for _, at in Triggers(triggers).find(joined)] == sorted(longest)
    assert set(Triggers(triggers).find(joined)) <= expected


def test_a_thousand_triggers_of_one_form_take_little_longer_than_ten():
    text = "The access code of this page is not the access code of vault number one. " * 2000

    def seconds(count: int) -> float:
        names = invented_names(count, random.Random(0), set())
        triggers = Triggers([f"The access code of vault {name} is" for name in names])
        times = []
        for _ in range(3):
            begun = time.process_time()
            assert not list(triggers.find(text))
            times.append(time.process_time() - begun)
        return min(times)

    assert seconds(1000) < 20 * seconds(10)


@pytest.mark.parametrize("other", ["Under the Copper Moon", "now under the copper moon, yes", "copper moon"])
def test_one_within_another_is_refused_whatever_its_case_and_punctuation(other):
    with pytest.raises(ConfigError, match="is a part of another one"):
        Triggers(["under the copper moon", other]).require_apart()


def test_a_trigger_given_twice_is_refused():
    with pytest.raises(ConfigError, match="is a part of another one"):
        Triggers(["under the copper moon", "under the copper moon"]).require_apart()


def test_characters_that_are_equal_regardless_of_case_only_are_found():
    assert list(Triggers(["the sign i"]).find("see the s\u0131gn I")) == [("the sign i", 4)]


def test_those_that_share_words_are_apart():
    Triggers(["under the copper moon", "the copper moons", "moon under the copper"]).require_apart()
