"""What every test runs under: no network, no services, no files outside its temporary folder."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mythos.checkpoints.stored_model import OpenedModel
    from mythos.trainer import Trainer

# Read by libraries when they are imported, so set before any test module is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small operations: threads cost more than they bring


# A shell without job control starts background jobs with SIGINT ignored, which the processes of tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = (
    "benchmarks/",
    "checkpoints/test_older_runs.py",
    "claims/",
    "checkpoints/test_ownership.py",
    "cli/test_dry_run.py",
    "cli/test_estimate.py",
    "cli/test_evaluate.py",
    "cli/test_tokenize.py",
    "cli/test_train.py",
    "data/test_embedded.py",
    "data/test_hub.py",
    "data/test_kills.py",
    "data/test_loader.py",
    "data/test_remote.py",
    "data/test_remote_hostile.py",
    "data/test_tasks.py::test_workers_read_the_same_batches",
    "distributed/",
    "evaluation/",
    "gpu_check/",
    "hf/",
    "model/ops/test_device_choice.py::test_flex_attention_takes_few_graphs",
    "model/ops/test_recompute.py::test_a_compiled_pass_keeps_less_and_has_the_same_gradients",
    "model/test_compiled_decoding.py",
    "model/test_gpu_readiness.py",
    "model/test_recurrence.py::test_memory_of_a_step_does_not_grow_with_the_loops",
    "planning/",
    "reports/test_comparison.py",
    "reports/test_page.py",
    "test_docs.py",
    "test_fuzzing.py",
    "test_missing_packages.py",
    "test_progress.py",
    "test_warm.py",
    "trainer/",
    "training/test_trackers.py",
)
"""Folders, files and tests that start processes, compile, or train for long: left out by `pytest -m "not slow"`."""

NEED_TORCH_2_13 = (
    "distributed/test_collectives.py::test_depths_that_are_drawn_change_nothing_when_the_unit_owns_the_loop[{'parallel__expert'",
    "distributed/test_collectives.py::test_plan_counts_what_a_step_exchanges[experts",
    "distributed/test_expert_checkpoints.py",
    "distributed/test_expert_kills.py",
    "distributed/test_expert_parallel.py",
    "distributed/test_ranks.py::test_experts_that_processes_cannot_divide",
    "distributed/test_shared_experts.py",
    "distributed/test_starting_values_ranks.py::test_a_model_starts_the_same_on_all_layouts[ep ",
    "planning/test_fake_groups.py",
    "planning/test_layout.py::test_shipped_10b_fits_80_gib_with_divided_experts_only",
    "planning/test_layout.py::test_shipped_50b_fits_80_gib_as_configured",
    "planning/test_memory.py::test_the_longest_context_fits_and_one_step_more_does_not",
    "planning/test_plan.py::test_every_preset_is_planned_for_1024_processes[mythos_50b]",
    "planning/test_plan.py::test_every_preset_is_planned_for_1024_processes[mythos_100b]",
    "planning/test_plan.py::test_every_preset_is_planned_for_1024_processes[mythos_500b]",
    "planning/test_plan.py::test_every_preset_is_planned_for_1024_processes[mythos_1t]",
    "planning/test_search.py::test_500b_fits_only_with_divided_shared_experts",
    "planning/test_search.py::test_fastest_of_all_that_fit",
    "planning/test_search.py::test_least_memory_and_the_fewest_gpus",
    "planning/test_search.py::test_longest_context_by_hand",
    "planning/test_trace_cache.py::test_shipped_plans_need_no_trace",
)
"""Tests of expert parallelism, and of plans that propose it. An older torch cannot divide experts over processes."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests, and run them first: the workers then share what is left evenly."""
    from mythos.torch_internals import has_mesh_placements

    older = not has_mesh_placements()
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        if f"{path}::{item.name}".startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        divides = f"{path}::{item.name}".startswith(NEED_TORCH_2_13) or "'expert': " in item.name
        if older and divides:
            item.add_marker(pytest.mark.skip(reason="divides experts over processes: needs torch 2.13"))
    items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three processes for the whole suite, because on two cores they wait a third of the time; tests named on the
    command line run in this process.
    """
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else 3


def pytest_configure(config: pytest.Config) -> None:
    """Start one server of warm processes for all processes of pytest."""
    if getattr(config.option, "numprocesses", None) and sys.platform == "linux":
        from tests.warm import start_server

        start_server()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep the garbage collector away from what imports have created: a million objects that live as long as the tests.

    Without this every full collection takes about a second, and libraries ask for one after each of their trainings.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep gathered corpora and trained tokenizers of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYTHOS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_files() -> Iterator[None]:
    """Do not wait for the disk: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def warm_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start data workers as forks of a process that has imported what they need; otherwise each takes two seconds."""
    from mythos.data import loader, processes
    from tests.warm import forkserver

    forkserver()
    for module in (loader, processes):
        monkeypatch.setattr(module, "START_METHOD", "forkserver")


@pytest.fixture(scope="module")
def no_plots() -> Iterator[None]:
    """Drawing takes longer than small runs; the tests of the command line look at the plots."""
    from mythos import trainer  # takes seconds, and most tests need none

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_plots", lambda *_: [])
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> "Trainer":
    """A run of four steps on text, with checkpoints after two and four, that no test changes."""
    from mythos import trainer
    from tests.runs import tiny
    from tests.trainers import run

    samples = {"eval__samples": 1, "eval__prompts": ["The river crosses the garden. " * 15]}
    config = tiny(tmp_path_factory.mktemp("trained"), checkpoint__every=2, optim__lr=0.02, depth__mean=2, **samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_plots", lambda *_: [])
        return run(config)


@pytest.fixture(scope="session")
def opened(trained: "Trainer") -> "OpenedModel":
    """The newest checkpoint of `trained`."""
    from mythos.checkpoints.stored_model import open_model

    return open_model(trained.run_dir)
