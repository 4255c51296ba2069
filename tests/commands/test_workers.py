"""How many processes a tool may start."""

import argparse

import pytest

from megagap.commands.preprocess import worker_count


def test_more_workers_than_a_machine_can_bear_are_refused_before_any_is_started():
    assert worker_count("1") == 1 and worker_count("64") == 64
    for text in ("0", "-1", "100000"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must be at (least|most)"):
            worker_count(text)
