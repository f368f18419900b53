"""Worker processes that read and tokenize: one thread each, unmoved by signals, and gone when their parent is."""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

from mythos.errors import log_messages

# Forked, a worker would hold locks of threads (of the tokenizer, of CUDA) that do not exist in it.
START_METHOD = "spawn"


def begin_worker() -> None:
    """Set up the present process as a worker; to be called first in it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Work is divided among processes, which share the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with suppress(ModuleNotFoundError):  # which a run on tasks, that reads no files, does not need
        import pyarrow as pa

        pa.set_cpu_count(1)
    # What was imported stays: looking through it for garbage again and again takes 2% of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    log_messages()


def _end_with_parent() -> None:
    """End this process when its parent ends, even by SIGKILL and in the middle of a read that waits for a server."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def signals_held(*numbers: signal.Signals) -> Iterator[None]:
    """These signals never reach processes started in here; this one sees them afterwards.

    A terminal sends Ctrl-C to all processes of a job, and a scheduler SIGTERM or SIGUSR1: a run that then saves must
    not lose those that read for it.
    """
    resource_tracker.ensure_running()  # started by the first worker, it would let the signal through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
