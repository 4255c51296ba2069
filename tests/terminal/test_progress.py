"""Progress is redrawn on a terminal; in a log each state is a line."""

import io
import sys

import pytest

from megagap.terminal import progress
from megagap.terminal.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("leave", [True, False])
def test_a_log_has_one_line_for_each_state_and_few_of_them(monkeypatch, leave):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for _ in ProgressBar(range(1_000), desc="steps", unit="step", leave=leave):
        pass
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and 1 <= len(lines) <= 2
    assert all(line.startswith("steps: ") and line == line.strip() for line in lines)
    assert "1000/1000" in lines[-1] or not leave


def test_a_log_gets_a_line_whenever_the_interval_has_passed(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with ProgressBar(total=3, miniters=1) as bar:
        for _ in range(3):
            bar.update()
    shown = [line.split("|")[2].split()[0] for line in log.getvalue().splitlines()]
    assert shown == ["0/3", "1/3", "2/3", "3/3", "3/3"]


def test_a_terminal_has_one_line_that_is_redrawn(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in ProgressBar(range(3), desc="steps"):
        pass
    assert terminal.getvalue().count("\r") >= 2 and terminal.getvalue().count("\n") == 1
