import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.pool import RankPool
from tests.warm import WarmPopen

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="package")
def pool() -> Iterator[RankPool]:
    """Four processes, of which a test uses as many as it asks for."""
    started = RankPool(4)
    try:
        yield started
    finally:
        started.close()


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start programs in Python, given as text, that end with the test whatever happens."""
    running: list[subprocess.Popen] = []

    def program(source: str, *arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-u", "-c", source, *map(str, arguments)]
        pipe = subprocess.PIPE
        running.append(WarmPopen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        return running[-1]

    try:
        yield program
    finally:
        for process in running:
            process.kill()
            process.communicate()
