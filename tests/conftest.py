import os
from collections.abc import Iterator

import pytest

from tests.workers import Workers

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Real processes on gloo, shared by all tests."""
    pool = Workers()
    yield pool
    pool.close()
