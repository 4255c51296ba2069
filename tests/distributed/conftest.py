from collections.abc import Iterator

import pytest

from tests.distributed.machines import Machines, can_make_namespaces, loopback_addresses, namespaces

FORM = "network namespaces" if can_make_namespaces() else "loopback addresses"


@pytest.fixture(params=[FORM])
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    """Two machines, in the truest form that can be had here; the test's id says which."""
    with namespaces() if request.param == "network namespaces" else loopback_addresses() as pair:
        yield pair
