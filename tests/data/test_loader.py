"""Worker processes do not change the batches, end with their parent, and pass on errors."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from mythos.data.loader import Loader
from mythos.data.stream import TokenStreams
from mythos.data.tokenizer import Tokenizer
from mythos.errors import MythosError
from tests.warm import WarmPopen

from .conftest import make_documents, make_streams, text_source, write_jsonl, write_parquet

ROOT = Path(__file__).parents[2]


def make_loader(streams: TokenStreams, **changes) -> Loader:
    return Loader(streams, **{"slots": 2, "workers": 0, "prefetch": 2, **changes})


def running_workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_a_worker_imports_no_model() -> None:
    """The import would take every worker a second and the memory of a compiler."""
    code = "import sys, mythos.data.loader; print({'mythos.model.rdt', 'torch._dynamo'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(("workers", "prefetch", "world_size"), [(1, 4, 2), (4, 2, 1)])
def test_workers_and_prefetch_change_nothing(
    workers: int,
    prefetch: int,
    world_size: int,
    parquet_folder: Callable[..., str],
    tokenizer: Tokenizer,
    warm_workers: None,
) -> None:
    """Two stretches with a resume and another number of workers between, against streams read in this process."""
    source = text_source(parquet_folder([*make_documents(90), None, ""], 3), tokenizer, 0.1, on_error="skip")

    def ranks(state: dict | None, workers: int) -> list[Loader]:
        loaders = [
            make_loader(
                make_streams(source, streams=6, eos_id=tokenizer.eos_id, rank=rank, world_size=world_size),
                workers=workers,
                prefetch=prefetch,
            )
            for rank in range(world_size)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
            loader.start()
        return loaders

    alone = make_streams(source, streams=6, eos_id=tokenizer.eos_id)
    others, state = set(multiprocessing.active_children()), None
    for stretch in (workers, 1 if workers > 1 else 2):
        loaders = ranks(state, stretch)
        for _ in range(7):
            expected = alone.next_batch(2)
            batches = [loader.next_batch() for loader in loaders]
            order = torch.cat([batch.rows for batch in batches]).argsort()
            assert torch.equal(torch.cat([batch.ids for batch in batches])[order], expected.ids)
            assert torch.equal(torch.cat([batch.document_ids for batch in batches])[order], expected.document_ids)
            assert all(batch.rows.tolist() == sorted(batch.rows.tolist()) for batch in batches)
            states = [loader.state_dict() for loader in loaders]
            state = states[0]
            for other in states[1:]:
                state = {
                    key: value | other[key] if key in ("sequences", "positions", "skipped") else value
                    for key, value in state.items()
                }
            assert state == alone.state_dict(), "what is prefetched is not consumed"
            state = json.loads(json.dumps(state))
        for loader in loaders:
            assert len(set(multiprocessing.active_children()) - others) >= stretch
            loader.close()
    assert not set(multiprocessing.active_children()) - others


def test_world_size_must_divide_streams(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "x.parquet", make_documents(20))
    with pytest.raises(MythosError, match=r"data\.streams: 4 is not a multiple of the 3 processes"):
        make_loader(make_streams(text_source(tmp_path / "x.parquet", tokenizer), world_size=3))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_problem_comes_in_its_turn_and_the_state_stays(
    workers: int, tmp_path: Path, tokenizer: Tokenizer, warm_workers: None
) -> None:
    documents: list = make_documents(400)
    documents[300] = None
    write_jsonl(tmp_path / "x.jsonl", documents)
    loader = make_loader(make_streams(text_source(tmp_path / "x.jsonl", tokenizer), streams=2), workers=workers)
    state = loader.state_dict()
    with pytest.raises(MythosError, match=r"^data: .*x\.jsonl, row 300 cannot be used: its text is null"):
        while True:
            loader.next_batch()
            state = loader.state_dict()
    assert loader.state_dict() == state and sum(state["sequences"].values()) > 0
    loader.close()


def test_a_worker_that_is_killed_is_reported(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "x.parquet", make_documents(40))
    loader = make_loader(make_streams(text_source(tmp_path / "x.parquet", tokenizer), streams=2), workers=1)
    loader.next_batch()
    (worker,) = running_workers()
    worker.send_signal(signal.SIGKILL)
    time.sleep(0.5)  # nothing is raised outside of the loader: not in the middle of a step
    with pytest.raises(MythosError, match=r"a data worker has died .*data\.workers"):
        for _ in range(10_000):  # several items of many small steps
            loader.next_batch()
    loader.close()


PARENT = """
    import sys, time
    from tests.data.conftest import make_streams, text_source
    from mythos.data.loader import Loader
    from mythos.data.tokenizer import Tokenizer

    if __name__ == "__main__":
        source = text_source(sys.argv[1], Tokenizer.load(sys.argv[2]))
        loader = Loader(make_streams(source), slots=2, workers=1, prefetch=50)
        loader.next_batch()
        print("reading", flush=True)
        time.sleep(600)  # and does not close the loader: an exception may come anywhere
"""


ENDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module")
def parents(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> Iterator[dict[signal.Signals, subprocess.Popen[str]]]:
    """Processes with workers, one for each way to end; started together, so that the tests wait once."""
    folder = tmp_path_factory.mktemp("parents")
    write_parquet(folder / "x.parquet", make_documents(100))
    tokenizer.save(folder / "tokenizer")
    (folder / "parent.py").write_text(textwrap.dedent(PARENT))
    started = {
        number: WarmPopen(
            [sys.executable, str(folder / "parent.py"), str(folder / "x.parquet"), str(folder / "tokenizer")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for number in ENDS
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", ENDS)
def test_workers_end_with_their_parent(
    number: signal.Signals, parents: dict[signal.Signals, subprocess.Popen[str]]
) -> None:
    process = parents[number]
    assert process.stdout and process.stdout.readline() == "reading\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2  # a worker, and multiprocessing's resource tracker
    if number is signal.SIGINT:  # as a terminal does: to the whole group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert errors.count("Traceback") == (number is signal.SIGINT), errors
