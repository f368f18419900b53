"""What every test runs under: no network, no services, no files outside its temporary folder."""

import os
from collections.abc import Iterator

import pytest

# Read by libraries when they are imported, so set before any test module is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small operations: threads cost more than they bring


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite in two processes, which often wait; what is named on the command line in this one."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else 2


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep gathered corpora and trained tokenizers of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYTHOS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def no_plots() -> Iterator[None]:
    """Drawing takes longer than small runs; the tests of the command line look at the plots."""
    from mythos import trainer  # takes seconds, and most tests need none

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_plots", lambda *_: [])
        yield
