import os
import signal
from collections.abc import Iterator

import pytest

from tests.workers import Workers

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts commands in the background with Ctrl-C ignored, which what we start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Real processes on gloo, shared by all tests."""
    pool = Workers()
    yield pool
    pool.close()
