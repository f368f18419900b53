"""Worker processes that read and tokenize: single-threaded, shielded from signals, ended with their parent."""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

from mythos.errors import log_messages

# A forked worker could inherit locks held by threads (of the tokenizer, of CUDA) that do not exist in it.
START_METHOD = "spawn"


def begin_worker() -> None:
    """Set up this process as a worker; the first call in it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The cores are shared by the processes, so each uses one thread.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with suppress(ModuleNotFoundError):  # a run on generated tasks reads no files and needs no pyarrow
        import pyarrow as pa

        pa.set_cpu_count(1)
    # Imported modules stay alive: searching them for garbage again and again would take 2% of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    log_messages()


def _end_with_parent() -> None:
    """End this process when its parent ends, even if that is killed, or if a read here is waiting for a server."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def signals_blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Block signals while processes are started, which inherit the mask; this process gets the signals afterwards.

    A terminal sends Ctrl-C to all processes of a job, and a scheduler SIGTERM or SIGUSR1: a run that then saves a
    checkpoint still needs its workers.
    """
    # Started here, because one started later by the first worker would unblock the signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
