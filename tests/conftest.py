import os
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests import launching
from tests.workers import Workers

pytest_plugins = ["tests.token_files"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts commands in the background with Ctrl-C ignored, which what we start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes is the machine's business: others may keep it busy. Tests over random examples try the same
# ones in each run, else they would fail by chance, on who changed something else; MEGAGAP_EXPLORE=1 looks for new ones.
EXPLORES = bool(os.environ.get("MEGAGAP_EXPLORE"))
settings.register_profile(
    "megagap",
    deadline=None,
    derandomize=not EXPLORES,
    database=settings().database if EXPLORES else None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("megagap")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of several processes, which take a file at a time, none is left with them."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Real processes on gloo, shared by all tests."""
    pool = Workers()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """A test that fails must not leave a run behind that slows the next ones down."""
    yield
    launching.kill_what_is_left()


@pytest.fixture(autouse=True)
def signals_are_left_as_they_were() -> Iterator[None]:
    """What starts in later tests would inherit which are blocked and which are ignored."""
    before = _blocked_and_ignored()
    yield
    assert _blocked_and_ignored() == before


def _blocked_and_ignored() -> tuple[set[signal.Signals | int], set[signal.Signals]]:
    ignored = {number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN}
    return signal.pthread_sigmask(signal.SIG_BLOCK, []), ignored
