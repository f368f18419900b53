"""Batches that worker processes read and tokenize ahead of training; the saved state is that of consumed batches."""

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

from mythos.data.processes import START_METHOD, begin_worker, signals_blocked
from mythos.data.stream import Batch, Streams, merge_states
from mythos.errors import MythosError

REQUESTS_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# A worker sends the steps of about this many tokens in one message: for small steps sent one by one, the messages would
# cost more than tokenizing. Not more than that, because the first batch waits for the whole message.
ITEM_TOKENS = 2**14
MOST_ITEM_STEPS = 16


class _Share(NamedTuple):
    """A worker's part of a batch, and the state of its streams after it."""

    ids: np.ndarray
    rows: np.ndarray
    state: dict[str, Any]


class _Shares(IterableDataset):
    """The endless shares of the worker process that iterates, as lists of ``steps``; an error is the last item."""

    def __init__(self, streams: Streams, slots: int, steps: int) -> None:
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
        except MythosError as error:  # raised in the worker, its message would be buried in a traceback
            yield [*item, error]


class Loader:
    """The batches of this rank's streams, the same whatever number of worker processes reads them.

    Each worker reads a share of the rank's streams, ``prefetch`` steps ahead. The state is that of the batches handed
    out; a resumed run reads again what workers had prefetched.

    Args:
        streams: this rank's streams.
        slots: sequences of every stream in a batch.
        workers: worker processes, at most one per stream; 0 reads in this process.
        prefetch: batches that workers read ahead.

    Raises:
        MythosError: the number of processes does not divide the number of streams.
    """

    def __init__(self, streams: Streams, *, slots: int, workers: int, prefetch: int) -> None:
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
        """Start the workers early, to read while the caller sets up; otherwise the first batch starts them."""
        if not self.workers or self._items is not None:
            return
        others = set(multiprocessing.active_children())
        with warnings.catch_warnings(), signals_blocked(*REQUESTS_TO_STOP), _child_signals():
            warnings.simplefilter("ignore", UserWarning)  # about more workers than cores, which the user chose
            self._items = iter(self._data_loader())
        self._processes = set(multiprocessing.active_children()) - others
        # At exit, multiprocessing would send workers SIGTERM, which they have blocked, and then wait for them.
        atexit.register(self.close)

    def _data_loader(self) -> DataLoader:
        return DataLoader(
            _Shares(self.streams, self.slots, self._item_steps),
            batch_size=None,
            num_workers=self.workers,
            # At least two: one being read while the other waits to be fetched.
            prefetch_factor=max(2, -(-self.prefetch // self._item_steps)),
            multiprocessing_context=START_METHOD,
            worker_init_fn=_begin_worker,
            # Items are NumPy arrays and plain values; converted to tensors, they would need shared memory.
            collate_fn=_unchanged,
        )

    def next_batch(self) -> Batch:
        """Hand out the next batch.

        Raises MythosError if the data cannot be read, or a worker has died. The state stays that of the last batch.
        """
        if not self.workers:
            batch = self.streams.next_batch(self.slots)
            self._state = self.streams.state_dict()
            return batch
        if not self._ready:
            # The workers' items have equally many steps, except one that ends with an error; padding with None comes
            # after it and is never reached.
            self._ready.extend(zip_longest(*(self._next_item() for _ in range(self.workers))))
        shares: list[_Share] = []
        for share in self._ready[0]:
            if isinstance(share, MythosError):
                raise share
            shares.append(share)
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
        """Position after the last batch handed out, see :meth:`Streams.state_dict`."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the batch after which ``state`` was saved; raises as :class:`Streams` does."""
        self.close()
        self.streams.load_state_dict(state)
        self._state = self.streams.state_dict()

    def close(self) -> None:
        """End the workers. If a loader is not closed, they end with its process."""
        atexit.unregister(self.close)
        self._ready.clear()
        self._items = None  # the iterator of a DataLoader ends its workers when it is dropped
        for process in self._processes:
            process.kill()  # in case it has not ended within torch's five seconds: it blocks SIGTERM
        self._processes.clear()


@contextmanager
def _child_signals() -> Iterator[None]:
    """Enable torch's SIGCHLD handler, which raises RuntimeError when a worker dies, within the block only.

    It is needed while this process waits for a batch: a worker that was killed while sending one never completes it. At
    other times it would raise in the middle of an optimizer step or of a save.
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
            _torch_handler = signal.getsignal(signal.SIGCHLD)  # torch installs it once, for a process's first workers
        signal.signal(signal.SIGCHLD, before)


_torch_handler: Any = None


def _unchanged(item: Any) -> Any:
    return item


def _begin_worker(_: int) -> None:
    begin_worker()
