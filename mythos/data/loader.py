"""Batches read and tokenized ahead of training by worker processes, with the state of what has been consumed."""

import atexit
import multiprocessing
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mythos.data.processes import START_METHOD, begin_worker, signals_held
from mythos.data.stream import Batch, TokenStreams, merge_states
from mythos.data.tasks import TaskStreams
from mythos.errors import MythosError

REQUESTS_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Workers hand over the steps of about so many tokens at once: one by one, small steps would cost more than their text.
# Not more, because the first batch waits for all of them.
ITEM_TOKENS = 2**14
MOST_ITEM_STEPS = 16


class _Share(NamedTuple):
    """A worker's part of a batch, and where its streams stand after it."""

    ids: np.ndarray
    rows: np.ndarray
    state: dict[str, Any]


class _Shares(IterableDataset):
    """The endless shares of the worker process that iterates, some steps at a time; a problem comes as the last one."""

    def __init__(self, streams: TokenStreams | TaskStreams, slots: int, steps: int) -> None:
        self.streams = streams
        self.slots = slots
        self.steps = steps

    def __iter__(self) -> Iterator[list[_Share | MythosError]]:
        info = get_worker_info()
        assert info is not None
        item: list[_Share | MythosError] = []
        try:
            share = self.streams.share(info.id, info.num_workers)
            while True:
                item.append(_Share(*share.next_ids(self.slots), share.state_dict()))
                if len(item) == self.steps:
                    yield item
                    item = []
        except MythosError as error:  # raised here, the message would be buried in a traceback
            yield [*item, error]


class Loader:
    """The batches of this rank's streams, in order, whatever number of worker processes reads them.

    Each worker holds a share of the rank's streams and is ``prefetch`` steps ahead. The state is that of the batches
    handed out: what workers have read beyond is read again by the next process.

    Args:
        streams: this rank's streams.
        slots: sequences of every stream in a batch.
        workers: worker processes, at most one a stream; 0 reads in this process.
        prefetch: batches that workers are ahead.

    Raises:
        MythosError: the number of processes does not divide the number of streams.
    """

    def __init__(self, streams: TokenStreams | TaskStreams, *, slots: int, workers: int, prefetch: int) -> None:
        if streams.streams % streams.world_size:
            raise MythosError(
                f"data.streams: {streams.streams} is not a multiple of the {streams.world_size} processes. Use a "
                "number of processes that divides it; changing data.streams starts another run."
            )
        self.streams = streams
        self.slots = slots
        self.workers = min(workers, streams.streams // streams.world_size)
        self.prefetch = prefetch
        self._state = streams.state_dict()
        step_tokens = slots * streams.streams // streams.world_size * streams.sequence_length
        self._item_steps = min(max(1, ITEM_TOKENS * self.workers // step_tokens), MOST_ITEM_STEPS)
        self._items: Iterator[list[_Share | MythosError]] | None = None
        self._processes: set[BaseProcess] = set()
        self._ready: deque[tuple[_Share | MythosError, ...]] = deque()

    def start(self) -> None:
        """Start the workers, so that they read while the caller does something else; the first batch does it too."""
        if not self.workers or self._items is not None:
            return
        others = set(multiprocessing.active_children())
        with warnings.catch_warnings(), signals_held(*REQUESTS_TO_STOP), _child_signals():
            warnings.simplefilter("ignore", UserWarning)  # more workers than cores: the user's to decide
            self._items = iter(self._data_loader())
        self._processes = set(multiprocessing.active_children()) - others
        # At its end, multiprocessing sends workers SIGTERM, which these do not see, and then waits for them.
        atexit.register(self.close)

    def _data_loader(self) -> DataLoader:
        return DataLoader(
            _Shares(self.streams, self.slots, self._item_steps),
            batch_size=None,
            num_workers=self.workers,
            # Two at least: one to be read while the other waits to be fetched.
            prefetch_factor=max(2, -(-self.prefetch // self._item_steps)),
            multiprocessing_context=START_METHOD,
            worker_init_fn=_begin_worker,
            # Items are NumPy arrays and plain values; converted to tensors, they would need shared memory.
            collate_fn=_unchanged,
        )

    def next_batch(self) -> Batch:
        """Hand out the next batch.

        Raises:
            MythosError: the data cannot be read, or a worker has died. The state stays that of the last batch.
        """
        if not self.workers:
            batch = self.streams.next_batch(self.slots)
            self._state = self.streams.state_dict()
            return batch
        if not self._ready:
            # Each worker's item holds as many steps, unless it ends with a problem.
            self._ready.extend(zip_longest(*(self._next_item() for _ in range(self.workers))))
        shares = self._ready[0]
        for problem in shares:
            if isinstance(problem, MythosError):
                raise problem
        self._ready.popleft()
        self._state = self._state | merge_states([share.state for share in shares])
        return self.streams.batch(
            np.concatenate([share.ids for share in shares]), np.concatenate([share.rows for share in shares])
        )

    def _next_item(self) -> list[_Share | MythosError]:
        self.start()
        assert self._items is not None
        try:
            with _child_signals():
                for process in self._processes:
                    if not process.is_alive():
                        raise RuntimeError(f"process {process.pid} ended with {process.exitcode}")
                return next(self._items)
        except RuntimeError as error:
            raise MythosError(
                f"a data worker has died ({error}). Out of memory? Lower data.workers or data.prefetch; the same "
                "command continues from the newest checkpoint."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, see :meth:`TokenStreams.state_dict`."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the batch that ``state`` was taken after; raises as :class:`TokenStreams` does."""
        self.close()
        self.streams.load_state_dict(state)
        self._state = self.streams.state_dict()

    def close(self) -> None:
        """End the workers. A loader that is not closed ends them when its process ends, in whatever way."""
        atexit.unregister(self.close)
        self._ready.clear()
        self._items = None  # the iterator of a DataLoader ends its workers when it is dropped
        for process in self._processes:
            process.kill()  # one that has not ended within the library's five seconds: it does not see SIGTERM
        self._processes.clear()


@contextmanager
def _child_signals() -> Iterator[None]:
    """torch's handler of a child's end in force, which raises RuntimeError.

    It must be while a batch is waited for: a worker that was killed in the middle of handing one over would never
    complete it. It must not be at other times: it would raise in the middle of an optimizer step or of a save.
    """
    global _torch_handler
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    if _torch_handler is not None:
        signal.signal(signal.SIGCHLD, _torch_handler)
    try:
        yield
    finally:
        if _torch_handler is None and signal.getsignal(signal.SIGCHLD) is not before:
            _torch_handler = signal.getsignal(signal.SIGCHLD)  # torch sets it once, with a process's first workers
        signal.signal(signal.SIGCHLD, before)


_torch_handler: Any = None


def _unchanged(item: Any) -> Any:
    return item


def _begin_worker(_: int) -> None:
    begin_worker()
