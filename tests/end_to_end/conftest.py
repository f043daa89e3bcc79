"""One server with the default model and the demo adapters, shared by the tests that do not change its adapters."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.servers import DEMO, serve


@pytest.fixture(scope="session")
def demo_server() -> Iterator[str]:
    """The URL of a server started as `make serve` starts it."""
    with serve(*DEMO) as url:
        yield url
