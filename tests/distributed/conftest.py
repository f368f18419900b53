from collections.abc import Iterator

import pytest

from tests.distributed.pool import RankPool


@pytest.fixture(scope="package")
def pool() -> Iterator[RankPool]:
    """Four processes, of which a test uses as many as it asks for."""
    started = RankPool(4)
    try:
        yield started
    finally:
        started.close()
