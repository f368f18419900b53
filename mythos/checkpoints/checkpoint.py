"""Atomic checkpoints: every rank writes to a temporary directory, which is checked, renamed, and marked last.

`step-N/` contains torch.distributed.checkpoint shards in the safetensors format (no pickle), `meta.json` with all that
is not a tensor and the size and CRC-32 of every shard, and the file `committed` with the CRC-32 of meta.json. A
directory without `committed` does not count.
"""

import contextlib
import copy
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from mythos.checkpoints.ownership import Run, claimed
from mythos.checkpoints.shards import SHARD_PREFIX, HostPlanner, ShardWriter, in_one_piece, rank_share, spread
from mythos.checkpoints.stored_checkpoint import (
    NOT_DISTRIBUTED,
    check_fit,
    fetch,
    file_problem,
    first_cause,
    listed_files,
    read_tensors,
    reason,
)
from mythos.distributed.collective_errors import collective_failure
from mythos.distributed.ranks import Ranks
from mythos.distributed.run_lock import RunLock
from mythos.errors import DiskFullError, MythosError
from mythos.files.local import is_full, remedy
from mythos.files.storage import (
    MARKER,
    LocalStorage,
    Origin,
    checksum,
    locate,
    open_storage,
    run_id,
    step_name,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

PROBE = ".probe-{}-{}"
"""Name of the file that every rank writes at the start of a run: a random key, and the rank."""
SPARE_BYTES = 1 << 20
"""Free space required beside the tensors' bytes, for meta.json and the file system's overhead."""


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that training continues from, by name; not copies.

    Names are `model.<name>` for parameters and buffers, `optim.<name>.<exp_avg | exp_avg_sq | step | momentum_buffer>`.
    Sharded tensors are DTensors.
    """
    parameters = dict(model.named_parameters())
    state = {f"model.{name}": tensor.detach() for name, tensor in (parameters | dict(model.named_buffers())).items()}
    for name, parameter in parameters.items():
        state |= {f"optim.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return state


class Checkpoints:
    """The checkpoints of a run. Every method is collective; a failure on any rank is the same error on all.

    `directory` is a local directory that all ranks share, or a URL of fsspec. `ranks` needs a group that nothing else
    uses, because a thread of this class communicates on it while training goes on. The newest `keep` checkpoints are
    kept, and those whose step is a multiple of `keep_every` (0 = none). `committed` is called on every rank with the
    step and path of a checkpoint that is complete, possibly in that thread.
    """

    def __init__(
        self,
        directory: str | Path,
        ranks: Ranks,
        *,
        keep: int,
        keep_every: int,
        asynchronous: bool,
        committed: Callable[[int, Path | str], None] = lambda step, path: None,
    ) -> None:
        self.directory, self.ranks, self.committed = directory, ranks, committed
        self.keep, self.keep_every, self.asynchronous = keep, keep_every, asynchronous
        self.storage = open_storage(directory)
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.newest: Path | str | None = None
        """The newest checkpoint known to be complete: the one from :meth:`find`, or one committed since."""
        self._run: Run | None = None
        self._resources = contextlib.ExitStack()
        # Here and once: filters are global to the process, so the writing thread must not change them.
        warnings.filterwarnings("ignore", message=NOT_DISTRIBUTED)

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed, as far as this rank knows; not collective. :meth:`wait` raises it."""
        return self._error is not None

    @property
    def saving(self) -> bool:
        """Whether bytes are being written in the background; not collective."""
        return self._thread is not None and self._thread.is_alive()

    # At the start of a run

    def claim(self, lock: RunLock, name: str) -> None:
        """Reserve the directory for one run until :meth:`close`. Call it first, before :meth:`find`.

        `lock` is the lock of the run's directory, taken by rank 0. It stores the run's id, which marks the run's
        checkpoints: see :func:`mythos.checkpoints.ownership.claimed`. `name` is the run's.

        Raises MythosError for a directory that a rank cannot write to or that ranks do not share, that another job
        uses, or that has another run's checkpoints.
        """
        key = self.ranks.broadcast(uuid.uuid4().hex[:8])
        try:
            self._check_writable(key)
            self._agree(lambda: self._check_shared(key) if self.ranks.main else None)
        finally:
            with contextlib.suppress(MythosError):  # a store may forbid deletion, and an empty object does no harm
                self._agree(lambda: self.storage.delete(PROBE.format(key, self.ranks.rank)))

        def take() -> Run:
            run = Run(lock.run or uuid.uuid4().hex, name, os.path.realpath(lock.directory))
            run = self._resources.enter_context(claimed(self.storage, run, begun=lock.run is not None))
            lock.keep(run.id)
            return run

        self._run = self._agree(lambda: take() if self.ranks.main else None)[0]

    def _check_writable(self, key: str) -> None:
        """Write a probe file from every rank. Raises MythosError with advice if one cannot."""
        try:
            self._agree(lambda: self.storage.probe(PROBE.format(key, self.ranks.rank)))
        except MythosError as error:
            raise (DiskFullError if is_full(error) else MythosError)(
                f"{self.directory}: checkpoints cannot be written there: {error}. {remedy(error)}, or set "
                "checkpoint.dir to another directory."
            ) from error

    def _check_shared(self, key: str) -> None:
        """Raise MythosError unless this rank sees the probe files of all ranks."""
        unseen = [rank for rank in range(self.ranks.size) if not self.storage.exists(PROBE.format(key, rank))]
        if unseen:
            raise MythosError(
                f"{self.directory}: rank 0 does not see files that rank {unseen[0]} writes there. All ranks must share "
                "the directory of checkpoints: set checkpoint.dir to one on a shared file system or object store"
            )

    def wrote(self, meta: dict[str, Any]) -> bool:
        """Whether this run wrote the checkpoint with this meta.json, as opposed to one that it started from."""
        return self._run is not None and run_id(meta) == self._run.id

    def require_space(self, tensors: dict[str, Tensor]) -> None:
        """Raise MythosError if the disk has too little room for a checkpoint of these tensors."""
        needed = _bytes_needed(tensors)
        with self._explained("the next checkpoint"):
            self._agree(lambda: self.storage.require_space(needed) if self.ranks.main else None)

    # Finding

    def find(self, resume: str) -> Path | str | None:
        """The checkpoint to resume from by `run.resume` (auto, never or a path); None to start from the beginning.

        A path is used only until the run has a checkpoint of its own, so that the same command continues the run.
        Files are read and compared with their checksums. A damaged checkpoint of the run is reported and marked, and
        the one before it is used.

        Raises MythosError for a path that is not a complete checkpoint or is one of this run's older ones, for `never`
        if there are checkpoints, and if all are damaged.
        """
        self.wait()
        candidates = self._agree(lambda: self._candidates(resume) if self.ranks.main else [])[0]
        damaged: dict[Path | str, str] = {}  # and the messages about them
        for path in candidates:
            problems = self._verify(path)
            if not problems:
                if damaged:
                    self._agree(partial(self._fall_back, path, list(damaged)))
                self.newest = path
                return path
            damaged[path] = f"checkpoint {path} is damaged: {'; '.join(problems)}"
            if self.ranks.main:
                logger.warning("%s", damaged[path])
        if damaged:
            raise MythosError(
                "there is no undamaged checkpoint to continue from:\n"
                + "\n".join(f"  {message}" for message in damaged.values())
                + "\nRestore one from a copy, name another one with run.resume, or begin anew with another "
                "run.name; nothing was changed."
            )
        return None

    def _candidates(self, resume: str) -> list[Path | str]:
        """Checkpoints to resume from, first choice first."""
        # Copies of another run's checkpoints, or links to them, do not count. Unreadable ones may be this run's.
        origins = {name: self.storage.origin(name) for name in reversed(self.storage.complete())}
        unknown = Origin(set(), set(), {})
        mine = [name for name, origin in origins.items() if origin in (None, unknown) or self.storage.owned(origin)]
        own = [self.storage.address(name) for name in mine]
        if len(own) < len(origins):
            logger.warning("%s: %d checkpoints of other runs do not count", self.directory, len(origins) - len(own))
        if resume == "auto":
            return own
        if resume == "never":
            if own:
                raise MythosError(
                    f"run.resume is never, but {own[0]} exists: choose another run.name or run.dir, move the old "
                    "checkpoints away, or set run.resume=auto to continue from it"
                )
            return []
        storage, name = locate(resume)
        if not storage.exists(name, MARKER):
            complete = ", ".join(map(str, reversed(own))) or "none in this run's directory"
            raise MythosError(
                f"run.resume={resume} is no complete checkpoint (a directory step-* with a file '{MARKER}'); "
                f"complete ones: {complete}"
            )
        path = _absolute(resume)
        if path in [_absolute(older) for older in own[1:]]:
            raise MythosError(
                f"run.resume={resume} is followed by newer checkpoints up to {own[0]}: to go back, move those away, or "
                "set run.dir to a new directory"
            )
        if not own:
            return [storage.address(name)]
        return own[:1] if path == _absolute(own[0]) else own

    def _verify(self, path: Path | str) -> list[str]:
        """Descriptions of all damage to a checkpoint; its files are divided over the ranks."""
        storage, name = locate(path)

        def listed() -> dict[str, dict[str, int]] | str:
            try:
                return listed_files(path)
            except MythosError as error:
                return str(error).removeprefix(f"checkpoint {path} is damaged: ")

        files = self._agree(lambda: listed() if self.ranks.main else {})[0]
        if isinstance(files, str):
            return [files]
        by_size = sorted(files, key=lambda file: files[file]["bytes"])
        mine = by_size[self.ranks.rank :: self.ranks.size]
        by_rank = self._agree(lambda: [file_problem(storage, name, file, files[file]) for file in mine])
        return sorted(problem for problems in by_rank for problem in problems if problem)

    def _fall_back(self, path: Path | str, damaged: list[Path | str]) -> None:
        """On rank 0, mark damaged checkpoints of this run, so that they do not count, and make `path` the newest."""
        if not self.ranks.main:
            return
        for bad in damaged:
            if self.storage.is_own(name := locate(bad)[1]):
                self.storage.demote(name)
        self.storage.point(locate(path)[1])
        logger.warning("continuing from %s; the next checkpoints replace the damaged ones", path)

    # Loading

    def load(self, path: Path | str, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place from a checkpoint with the same names and global shapes, however it was sharded.

        Raises MythosError, before anything is changed, for a checkpoint of another model (it lists the first differing
        names), and for a damaged one.
        """
        self.wait()
        with self._local_copy(path) as folder:
            self._agree(lambda: check_fit(path, folder, tensors) if self.ranks.main else None)
            pieces = {name: in_one_piece(tensor) for name, tensor in tensors.items()}
            read_tensors(path, folder, pieces, **self._group)
        for name, piece in pieces.items():
            spread(piece, tensors[name])

    @contextlib.contextmanager
    def _local_copy(self, path: Path | str) -> Iterator[Path]:
        """The checkpoint as a local directory; a remote one is fetched, each file once a machine."""
        storage, name = locate(path)
        if isinstance(storage, LocalStorage):
            yield storage.address(name)
            return
        key, hosts = self.ranks.broadcast(uuid.uuid4().hex), self.ranks.gather(socket.gethostname())
        peers = [rank for rank, host in enumerate(hosts) if host == hosts[self.ranks.rank]]
        position = peers.index(self.ranks.rank)
        folder = Path(tempfile.gettempdir()) / f"mythos-{name}-{key}"

        def fetch_share() -> None:
            folder.mkdir(mode=0o700, exist_ok=True)
            fetch(storage, name, sorted(listed_files(path))[position :: len(peers)], folder)

        try:
            self._agree(fetch_share)
            yield folder
        finally:
            if position == 0:
                shutil.rmtree(folder, ignore_errors=True)

    # Saving

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], *, wait: bool = False) -> None:
        """Write and commit `step-N`, then remove old checkpoints; if asynchronous, while training goes on.

        `tensors` and `meta` (rank 0's is written) may be changed after the return. With `wait`, the checkpoint is on
        disk by then. First finishes a save under way. Raises MythosError if a rank's disk is full or cannot be written,
        also for the earlier save; older checkpoints are not touched by a failed save.
        """
        self.wait()
        tensors = {name: in_one_piece(tensor) for name, tensor in tensors.items()}
        share = rank_share(tensors, self.ranks)
        background = self.asynchronous and not wait
        host: dict[str, Tensor] = {}
        with self._explained(f"checkpoint of step {step}"):
            self._agree(lambda: host.update(self._to_host(share, background)))
        owner = {"run": asdict(self._run)} if self._run else {}
        meta = {"step": step, **owner, **copy.deepcopy(meta)}
        needed = _bytes_needed(tensors)
        if not background:
            self._write(step, share, host, meta, needed)
            return

        def work() -> None:
            try:
                self._write(step, share, host, meta, needed)
            except Exception as error:  # raised by `wait`
                self._error = error

        # Not a daemon: a process that ends while one of its threads waits for other ranks is aborted.
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Finish the save under way, if there is one. Raises its MythosError."""
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Finish the save under way, logging its error, and free the buffers on the host."""
        try:
            with self._resources:
                self.wait()
        except Exception as error:
            logger.error("%s", error)
        self._buffers.clear()

    def _to_host(self, share: dict[str, Tensor], copied: bool) -> dict[str, Tensor]:
        """This rank's share on the host, copied into reused buffers; not copied if on the CPU and `copied` is false."""
        host, buffers = {}, {}
        for name, tensor in share.items():
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            if local.device.type == "cpu" and not copied:
                host[name] = local
                continue
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            host[name] = buffers[name] = buffer.copy_(local, non_blocking=True)
        if any(tensor.is_cuda for tensor in share.values()):
            torch.cuda.synchronize()
        self._buffers |= buffers
        return host

    def _write(
        self, step: int, share: dict[str, Tensor], host: dict[str, Tensor], meta: dict[str, Any], needed: int
    ) -> None:
        """Prepare on rank 0, write on all, commit and prune on rank 0."""
        name, storage, ranks, run = step_name(step), self.storage, self.ranks, self._run
        folder: Path | None = None

        def prepare() -> None:
            nonlocal folder
            if ranks.main:
                storage.prepare(name, needed, run.id if run else None)
            folder = storage.workspace(name, sum(tensor.nbytes for tensor in host.values()))

        def seal() -> dict[str, dict[str, int]]:
            assert folder is not None, "prepare ran first"
            sums = {}
            for file in sorted(folder.glob(f"{SHARD_PREFIX.format(ranks.rank + 1)}*")):
                with open(file, "rb") as stream:
                    sums[file.name] = checksum(stream)
                storage.deliver(name, file)
            return sums

        def commit(sums: list[dict[str, dict[str, int]]]) -> None:
            for rank, files in enumerate(sums):
                for file, expected in files.items():
                    if storage.size(name, file) != expected["bytes"]:
                        raise OSError(f"rank 0 does not see {file} of rank {rank}: all ranks must share the directory")
            files = {file: expected for one in sums for file, expected in one.items()}
            text = json.dumps({**meta, "files": files}, indent=1).encode()
            owner = {"run": run.id, "step": step} if run else {}
            storage.commit(name, text, json.dumps({"meta_crc32": zlib.crc32(text), **owner}).encode())

        with self._explained(f"checkpoint of step {step}"):
            try:
                self._agree(prepare)
                writer = ShardWriter(str(folder), save_distributed=True)
                dcp.save(share, storage_writer=writer, planner=HostPlanner(host), **self._group)
                sums = self._agree(seal)
                self._agree(lambda: commit(sums) if ranks.main else None)
            finally:
                # A commit has renamed it already. A directory shared by all ranks is removed by rank 0.
                if folder is not None and (ranks.main or not isinstance(storage, LocalStorage)):
                    shutil.rmtree(folder, ignore_errors=True)
        self.newest = storage.address(name)
        self.committed(step, self.newest)
        if ranks.main:
            try:
                storage.prune(self.keep, self.keep_every)
            except Exception as error:  # the new checkpoint is complete all the same
                logger.warning("old checkpoints in %s could not be removed: %s", self.directory, reason(error))

    # Agreement

    @property
    def _group(self) -> dict[str, Any]:
        """Options of torch.distributed.checkpoint for the participating ranks."""
        return {"process_group": self.ranks.group, "no_dist": self.ranks.group is None}

    def _agree(self, work: Callable[[], T]) -> list[T]:
        """Run an action on every rank and return all results, or raise the same MythosError on every rank.

        It is a DiskFullError if a rank's disk is full.
        """
        result = problem = cause = None
        try:
            result = work()
        except Exception as error:
            problem, cause = (reason(error), is_full(error)), error
        outcomes = self.ranks.gather((problem, result))
        try:
            for rank, (problem, _) in enumerate(outcomes):
                if problem is not None:
                    text, full = problem
                    kind = DiskFullError if full else MythosError
                    raise kind(f"rank {rank}: {text}" if rank else text) from cause
        finally:
            del cause  # its traceback has this frame: a cycle, which would keep the run's lock
        return [result for _, result in outcomes]

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Add to an error which checkpoint failed, which one is kept, and what to do."""
        try:
            yield
        except (MythosError, CheckpointException, RuntimeError) as error:
            if collective_failure(error):
                raise
            newest = f"the newest complete checkpoint is {self.newest}"
            kept = newest if self.newest else "there is no earlier checkpoint"
            cause: BaseException = error
            why = reason(error)
            if isinstance(error, CheckpointException):
                why, cause = first_cause(error), min(error.failures.items())[1][0]
            full = is_full(cause)
            elsewhere = "another disk, or lower checkpoint.keep" if full else "another directory"
            raise (DiskFullError if full else MythosError)(
                f"{what} could not be written to {self.directory}: {why}; {kept}. {remedy(cause)} (or set "
                f"checkpoint.dir to {elsewhere}) and run the same command again."
            ) from error


def _bytes_needed(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values()) + SPARE_BYTES


def _absolute(path: Path | str) -> str:
    return str(path).rstrip("/") if "://" in str(path) else os.path.realpath(path)
