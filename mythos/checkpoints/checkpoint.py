"""Checkpoints that are either complete or not there: written aside by every rank, checked, renamed, and marked last.

`step-N/` holds torch.distributed.checkpoint shards in the safetensors format (no pickle), `meta.json` with everything
that is not a tensor and the size and CRC-32 of every shard, and the file `committed` with the CRC-32 of meta.json,
without which a directory does not count.
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
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from mythos.checkpoints.ownership import Run, claimed
from mythos.checkpoints.stored_checkpoint import (
    NOT_DISTRIBUTED,
    check_fit,
    difference,
    fetch,
    first_cause,
    listed_files,
    reason,
)
from mythos.checkpoints.stored_checkpoint import complete_checkpoints as complete_checkpoints
from mythos.checkpoints.stored_checkpoint import read_meta as read_meta
from mythos.checkpoints.stored_checkpoint import read_tensors as read_tensors
from mythos.checkpoints.stored_checkpoint import saved_shapes as saved_shapes
from mythos.checkpoints.stored_checkpoint import verified_copy as verified_copy
from mythos.distributed.ranks import Ranks
from mythos.distributed.restarts import collective_failure
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
from mythos.files.storage import step_of as step_of
from mythos.torch_internals import shard_file_name, shard_metadata

logger = logging.getLogger(__name__)
T = TypeVar("T")

SPARE_BYTES = 1 << 20
"""Room for meta.json and file system overhead asked for beside the tensors."""


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that training continues from, by name; the tensors are the live ones, not copies.

    `model.<name>` for parameters and buffers, `optim.<name>.<exp_avg | exp_avg_sq | step | momentum_buffer>`. Sharded
    ones are DTensors.
    """
    parameters = dict(model.named_parameters())
    state = {f"model.{name}": tensor.detach() for name, tensor in (parameters | dict(model.named_buffers())).items()}
    for name, parameter in parameters.items():
        state |= {f"optim.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return state


class Checkpoints:
    """The checkpoints of a run. Every method is collective; a failure on any rank is the same error on all.

    `directory` is a local directory that all ranks share, or a URL of fsspec. `ranks` speak over a group that nothing
    else uses, because a thread of this class speaks on it while training goes on. `keep` newest checkpoints are kept,
    and those whose step is a multiple of `keep_every` (0 = none).
    """

    def __init__(self, directory: str | Path, ranks: Ranks, *, keep: int, keep_every: int, asynchronous: bool) -> None:
        self.directory, self.ranks = directory, ranks
        self.keep, self.keep_every, self.asynchronous = keep, keep_every, asynchronous
        self.storage = open_storage(directory)
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._newest: Path | str | None = None
        self._run: Run | None = None
        self._resources = contextlib.ExitStack()
        # Once and here, because filters belong to the process: the writing thread must not change them meanwhile.
        warnings.filterwarnings("ignore", message=NOT_DISTRIBUTED)

    @property
    def newest(self) -> Path | str | None:
        """The newest checkpoint that is known to be complete: found, or committed since."""
        return self._newest

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed, as far as this rank knows; not collective. :meth:`wait` raises it."""
        return self._error is not None

    @property
    def saving(self) -> bool:
        """Whether bytes are being written in the background; not collective."""
        return self._thread is not None and self._thread.is_alive()

    # Beginning

    def claim(self, lock: RunLock, name: str) -> None:
        """Make the place ready for one run alone, until :meth:`close`; before anything is searched there or trained.

        `lock` is that of the run's directory, held by rank 0; it keeps the run's id, by which its checkpoints are told
        from others: see :func:`mythos.checkpoints.ownership.claimed`. `name` is the run's.

        Raises MythosError for a place that a rank cannot write to or that ranks do not share, for one that another
        job uses, and for one that holds another run's checkpoints.
        """
        key = self.ranks.broadcast(uuid.uuid4().hex[:8])

        def look() -> None:
            unseen = [rank for rank in range(self.ranks.size) if not self.storage.probed(f"{key}-{rank}")]
            if unseen:
                raise MythosError(
                    f"{self.directory}: what rank {unseen[0]} writes there is not seen by rank 0. All ranks must share "
                    "the directory of checkpoints: set checkpoint.dir to one on a shared file system or object store"
                )

        try:
            try:
                self._agree(lambda: self.storage.probe(f"{key}-{self.ranks.rank}"))
            except MythosError as error:
                raise (DiskFullError if is_full(error) else MythosError)(
                    f"{self.directory}: checkpoints cannot be written there: {error}. {remedy(error)}, or set "
                    "checkpoint.dir to another directory."
                ) from error
            self._agree(lambda: look() if self.ranks.main else None)
        finally:
            with contextlib.suppress(MythosError):  # a store may allow no deletion, and an empty object does no harm
                self._agree(lambda: self.storage.end_probe(f"{key}-{self.ranks.rank}"))

        def claim() -> Run:
            run = Run(lock.run or uuid.uuid4().hex, name, os.path.realpath(lock.directory))
            run = self._resources.enter_context(claimed(self.storage, run, begun=lock.run is not None))
            lock.keep(run.id)
            return run

        self._run = self._agree(lambda: claim() if self.ranks.main else None)[0]

    def wrote(self, meta: dict[str, Any]) -> bool:
        """Whether a checkpoint with this meta.json is one of this run, not what it has begun from."""
        return self._run is not None and run_id(meta) == self._run.id

    def require_space(self, tensors: dict[str, Tensor]) -> None:
        """Raise MythosError if it is known now that a checkpoint of these tensors will not fit."""
        needed = _bytes_needed(tensors)
        with self._explained("the next checkpoint"):
            self._agree(lambda: self.storage.require_space(needed) if self.ranks.main else None)

    # Finding

    def find(self, resume: str) -> Path | str | None:
        """The checkpoint that `run.resume` (auto, never or a path) means, or None to start from the beginning.

        A path counts while the run has no checkpoint of its own: the same command, given again, continues the run.
        Files are read and compared with their checksums. A damaged checkpoint of the run is reported, counts no more,
        and the one before it is taken. Raises MythosError for a path that is no complete checkpoint or one of this
        run's that has successors, for `never` where there are checkpoints already, and where all are damaged.
        """
        self.wait()
        candidates = self._agree(lambda: self._candidates(resume) if self.ranks.main else [])[0]
        damaged = []
        for path in candidates:
            problems = self._verify(path)
            if not problems:
                break
            damaged.append((path, f"checkpoint {path} is damaged: {'; '.join(problems)}"))
            if self.ranks.main:
                logger.warning("%s", damaged[-1][1])
        else:
            if damaged:
                raise MythosError(
                    "there is no whole checkpoint to continue from:\n"
                    + "\n".join(f"  {text}" for _, text in damaged)
                    + "\nRestore one from a copy, name another one with run.resume, or begin anew with another "
                    "run.name; nothing was changed."
                )
            return None
        if damaged:
            self._agree(lambda: self._fall_back(path, [bad for bad, _ in damaged]) if self.ranks.main else None)
        self._newest = path
        return path

    def _candidates(self, resume: str) -> list[Path | str]:
        """What may be continued from, first choice first."""
        # Another run's copy, or link, does not count. What cannot be read at all may be this run's, and is verified.
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
            found = ", ".join(map(str, reversed(own))) or "none in this run's directory"
            raise MythosError(
                f"run.resume={resume} is no complete checkpoint (a directory step-* with a file '{MARKER}'); "
                f"complete ones: {found}"
            )
        given = _absolute(resume)
        if given in [_absolute(path) for path in own[1:]]:
            raise MythosError(
                f"run.resume={resume} has successors up to {own[0]}: to go back, move those away, or set run.dir to "
                "a new directory"
            )
        if not own:
            return [storage.address(name)]
        return own[:1] if given == _absolute(own[0]) else own

    def _verify(self, path: Path | str) -> list[str]:
        """What is wrong with a checkpoint, in words; its files are divided over the ranks."""
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
        found = self._agree(lambda: [difference(storage, name, file, files[file]) for file in mine])
        return sorted(problem for problems in found for problem in problems if problem)

    def _fall_back(self, path: Path | str, damaged: list[Path | str]) -> None:
        for bad in damaged:
            if self.storage.is_own(name := locate(bad)[1]):
                self.storage.demote(name)
        self.storage.point(locate(path)[1])
        logger.warning("continuing from %s; what was damaged is replaced by the next checkpoints", path)

    # Loading

    def load(self, path: Path | str, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place from a checkpoint with the same names and (global) shapes, however it was sharded.

        Raises MythosError, before anything is changed, for a checkpoint of another model (the first differing names are
        listed), and for one that is damaged.
        """
        self.wait()
        with self._at_hand(path) as folder:
            self._agree(lambda: check_fit(path, folder, tensors) if self.ranks.main else None)
            read_tensors(path, folder, tensors, **self._group)

    @contextlib.contextmanager
    def _at_hand(self, path: Path | str) -> Iterator[Path]:
        """The checkpoint as a local directory; a remote one is fetched, each file once a machine."""
        storage, name = locate(path)
        if isinstance(storage, LocalStorage):
            yield storage.address(name)
            return
        key, hosts = self.ranks.broadcast(uuid.uuid4().hex), self.ranks.gather(socket.gethostname())
        peers = [rank for rank, host in enumerate(hosts) if host == hosts[self.ranks.rank]]
        position = peers.index(self.ranks.rank)
        folder = Path(tempfile.gettempdir()) / f"mythos-{name}-{key}"

        def bring() -> None:
            folder.mkdir(mode=0o700, exist_ok=True)
            fetch(storage, name, sorted(listed_files(path))[position :: len(peers)], folder)

        try:
            self._agree(bring)
            yield folder
        finally:
            if position == 0:
                shutil.rmtree(folder, ignore_errors=True)

    # Saving

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], *, wait: bool = False) -> None:
        """Write and commit `step-N`, then remove what is no longer kept; where asynchronous, while training goes on.

        `tensors` and `meta` (rank 0's counts) may change on return; with `wait`, the checkpoint is on disk by then.
        First finishes a save under way. Raises MythosError, also that one's, when a rank's disk is full or cannot be
        written; what was saved before stays as it was.
        """
        self.wait()
        part = _part(tensors, self.ranks)
        background = self.asynchronous and not wait
        host: dict[str, Tensor] = {}
        with self._explained(f"checkpoint of step {step}"):
            self._agree(lambda: host.update(self._to_host(part, background)))
        mark = {"run": asdict(self._run)} if self._run else {}
        meta = {"step": step, **mark, **copy.deepcopy(meta)}
        needed = _bytes_needed(tensors)
        if not background:
            self._write(step, part, host, meta, needed)
            return

        def work() -> None:
            try:
                self._write(step, part, host, meta, needed)
            except Exception as error:
                self._error = error

        # No daemon: a process that ends while one of its threads waits for other ranks is aborted.
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
        """Finish the save under way and free what copies are kept in; logs the save's error."""
        try:
            with self._resources:
                self.wait()
        except Exception as error:
            logger.error("%s", error)
        self._buffers.clear()

    def _to_host(self, part: dict[str, Tensor], copied: bool) -> dict[str, Tensor]:
        """This rank's bytes on the host: in buffers that are kept, unless they are there and no copy is needed."""
        host, buffers = {}, {}
        for name, tensor in part.items():
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            if local.device.type == "cpu" and not copied:
                host[name] = local
                continue
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            host[name] = buffers[name] = buffer.copy_(local, non_blocking=True)
        if any(tensor.is_cuda for tensor in part.values()):
            torch.cuda.synchronize()
        self._buffers |= buffers
        return host

    def _write(
        self, step: int, part: dict[str, Tensor], host: dict[str, Tensor], meta: dict[str, Any], needed: int
    ) -> None:
        name, storage, ranks, run = step_name(step), self.storage, self.ranks, self._run
        folder: Path | None = None

        def prepare() -> None:
            nonlocal folder
            if ranks.main:
                storage.prepare(name, needed, run.id if run else None)
            folder = storage.workspace(name, sum(tensor.nbytes for tensor in host.values()))

        def seal() -> dict[str, dict[str, int]]:
            sums = {}
            for file in sorted(folder.glob(f"{SHARD.format(ranks.rank + 1)}*")):
                with open(file, "rb") as stream:
                    sums[file.name] = checksum(stream)
                storage.deliver(name, file)
            return sums

        def commit(sums: list[dict[str, dict[str, int]]]) -> None:
            for rank, files in enumerate(sums):
                for file, expected in files.items():
                    if storage.size(name, file) != expected["bytes"]:
                        raise OSError(
                            f"{file} of rank {rank} is not seen by rank 0: all ranks must share the directory"
                        )
            files = {file: expected for one in sums for file, expected in one.items()}
            text = json.dumps({**meta, "files": files}, indent=1).encode()
            mark = {"run": run.id, "step": step} if run else {}
            storage.commit(name, text, json.dumps({"meta_crc32": zlib.crc32(text), **mark}).encode())

        with self._explained(f"checkpoint of step {step}"):
            try:
                self._agree(prepare)
                writer = _ShardWriter(str(folder), save_distributed=True)
                dcp.save(part, storage_writer=writer, planner=_HostPlanner(host), **self._group)
                sums = self._agree(seal)
                self._agree(lambda: commit(sums) if ranks.main else None)
            finally:
                # Gone already where it was committed. Only one rank owns a shared directory.
                if folder is not None and (ranks.main or not isinstance(storage, LocalStorage)):
                    storage.discard(folder)
        self._newest = storage.address(name)
        if ranks.main:
            try:
                storage.prune(self.keep, self.keep_every)
            except Exception as error:  # what is saved is saved
                logger.warning("old checkpoints in %s could not be removed: %s", self.directory, reason(error))

    # Agreement

    @property
    def _group(self) -> dict[str, Any]:
        """How torch.distributed.checkpoint is told who takes part."""
        return {"process_group": self.ranks.group, "no_dist": self.ranks.group is None}

    def _agree(self, work: Callable[[], T]) -> list[T]:
        """Do something on every rank and return all results, or raise the same MythosError on every rank.

        It is a DiskFullError where a rank's disk is full.
        """
        result = problem = cause = None
        try:
            result = work()
        except Exception as error:
            problem, cause = (reason(error), is_full(error)), error
        outcomes = self.ranks.gather((problem, result))
        for rank, (problem, _) in enumerate(outcomes):
            if problem is not None:
                text, full = problem
                kind = DiskFullError if full else MythosError
                raise kind(f"rank {rank}: {text}" if rank else text) from cause
        return [result for _, result in outcomes]

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Say of an error which checkpoint it lost, which one is kept, and what to do."""
        try:
            yield
        except (MythosError, CheckpointException, RuntimeError) as error:
            if collective_failure(error):
                raise
            kept = (
                f"the newest complete checkpoint is {self._newest}"
                if self._newest
                else "there is no earlier checkpoint"
            )
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


# Who writes what

SHARD = "shard-{:05d}-"
"""How torch.distributed.checkpoint begins the names of a rank's files, counted from 1."""


def _part(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors of which this rank writes its shard: of what several ranks hold alike, each an equal share.

    The library deduplicates too, but only once all is copied.
    """
    part = {}
    written: dict[int, list[int]] = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        copies, mine = _copies(tensors[name], ranks)
        sizes = written.setdefault(copies, [0] * copies)
        chosen = sizes.index(min(sizes))
        sizes[chosen] += tensors[name].nbytes
        if chosen == mine:
            part[name] = tensors[name]
    return part


def _copies(tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    """How many ranks hold the same bytes, and which of them this one is."""
    if not isinstance(tensor, DTensor):
        return ranks.size, ranks.rank
    copies, mine = 1, 0
    mesh = tensor.device_mesh
    for placement, size, position in zip(tensor.placements, mesh.shape, mesh.get_coordinate(), strict=True):
        if placement.is_replicate():
            copies, mine = copies * size, mine * size + position
    return copies, mine


class _HostPlanner(dcp.DefaultSavePlanner):
    """Plans by the live tensors' layout and hands out their copies on the host."""

    def __init__(self, host: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.host = host

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.host[index.fqn]


class _ShardWriter(dcp.HuggingFaceStorageWriter):
    """Writes a file straight from the tensors.

    The library's own first builds it in memory, twice, and lets no other thread run meanwhile (seconds a gigabyte).
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors = {item.index.fqn: planner.resolve_data(item).contiguous() for item in plan.items}
        offsets = {item.index.fqn: item.tensor_data.chunk.offsets for item in plan.items}
        if tensors:
            file = self.path / shard_file_name(plan.storage_data["shard_index"])
            save_file(tensors, file, metadata=shard_metadata(offsets))
        done: Future[list[WriteResult]] = Future()
        done.set_result([])  # only a consolidated index would need them
        return done


def _bytes_needed(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values()) + SPARE_BYTES


def _absolute(path: Path | str) -> str:
    return str(path).rstrip("/") if "://" in str(path) else os.path.realpath(path)
