import os
import shutil
from collections.abc import Iterator

import pytest

from tests.ops.gpu_source.shim import Shim, build


@pytest.fixture(scope="session")
def shims(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Shim]:
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("needs a C++ compiler")
    return {shim.wave: shim for shim in build(tmp_path_factory.mktemp("shim"), (32, 64))}


@pytest.fixture(params=[32, 64], ids=["wave32", "wave64"])
def shim(request: pytest.FixtureRequest, shims: dict[int, Shim]) -> Iterator[Shim]:
    yield shims[request.param]
    shims[request.param].reverse_threads(False)
