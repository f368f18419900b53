"""The processes of a run: how they find each other, agree, and part."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from mythos.config.sections import Config
from mythos.distributed.host_memory import keep_freed_memory
from mythos.errors import MythosError, short_reason
from mythos.files.local import advise
from mythos.torch_internals import set_timeout

T = TypeVar("T")


class Ranks:
    """Processes that talk to each other on the host, over a gloo group of their own; alone without one.

    Every method but the properties is collective: all ranks call it, in the same order. Values travel pickled between
    processes of one run and never reach a disk.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the one that prints and writes what all share."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in the order of the ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def max(self, value: int) -> int:
        """The largest of all ranks' values, on every rank."""
        if self.group is None:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def agreed(self, action: Callable[[], T]) -> T:
        """Run an action; if it fails on any rank, all ranks raise MythosError instead of waiting for it."""
        if self.group is None:
            return action()
        result, problem = None, None
        try:
            result = action()
        except MythosError as error:
            problem = str(error)
        except OSError as error:
            problem = advise(error)
        self.raise_any(problem)
        return cast(T, result)

    def raise_any(self, problem: str | None) -> None:
        """Raise MythosError on all ranks if any rank has a problem."""
        problems = self.gather(problem)
        told = dict.fromkeys(text for text in problems if text is not None)
        if told:
            lines = [text if problems[0] == text else f"rank {problems.index(text)}: {text}" for text in told]
            raise MythosError("\n".join(lines))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.group is not None:
            dist.barrier(self.group)


@dataclass
class World:
    """All processes of the run as this one sees them. :func:`join_world` or :func:`meet_world` makes it.

    End it with :meth:`leave`.
    """

    device: torch.device
    ranks: Ranks
    """For what the training loop agrees on."""
    storage: Ranks
    """The same processes over another group, for a thread that writes checkpoints meanwhile."""
    local_rank: int = 0
    local_size: int = 1
    """Processes on this machine."""
    device_groups: list[dist.ProcessGroup | None] = field(default_factory=lambda: [None])
    """Groups that the devices' collectives use; None is the default one."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.ranks.size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor on the device over all ranks, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def in_turn(self, action: Callable[[], T]) -> T:
        """Run an action first on one process of each machine, then on the others, which find its caches filled.

        Raises MythosError on all ranks if one does.
        """
        first = self.ranks.agreed(lambda: action() if self.local_rank == 0 else None)
        others = self.ranks.agreed(lambda: action() if self.local_rank != 0 else None)
        return cast(T, first if self.local_rank == 0 else others)

    def add_groups(self, groups: list[dist.ProcessGroup], timeout: float) -> None:
        """Let collectives of further groups of devices, too, fail after so many seconds."""
        for group in groups:
            set_timeout(group, timeout)
        self.device_groups += groups

    def set_timeouts(self, devices: float, hosts: float) -> None:
        """Let later collectives of the devices, and of the hosts' agreements, fail after so many seconds.

        The group that checkpoints are written over keeps the first one: disks may be slow.
        """
        if self.size > 1:
            for group in self.device_groups:
                set_timeout(group, devices)
            set_timeout(self.ranks.group, hosts)

    def leave(self) -> None:
        """Part together: without the barrier a process that is done early cuts the others' last messages off."""
        if self.size > 1:
            self.ranks.barrier()
            dist.destroy_process_group()
            # A group's threads end with the last reference to it. One that has yet to release a tensor of the last
            # collective when Python ends aborts the process (https://github.com/pytorch/pytorch/issues/190489). A
            # model may hold the devices' groups for longer: their last collective is long over.
            self.ranks.group = self.storage.group = None
            self.device_groups = []


def join_world(config: Config) -> World:
    """Find the other processes of a run, and make this one ready for its steps.

    Raises MythosError as `meet_world` does, if the configuration does not fit the number of processes, or if two ranks
    were given different configurations.
    """
    parallel = config.parallel
    world = meet_world(config.train.device, start_timeout=parallel.start_timeout, timeout=parallel.timeout)
    if world.size > 1:
        check_fit(config, world.size)
        check_same_config(config, world.ranks)
    if world.device.type == "cpu":
        keep_freed_memory()
    return world


def meet_world(
    device_name: str, *, start_timeout: float = 1800.0, timeout: float = 300.0, option: str = "train.device"
) -> World:
    """Find the other processes that torchrun (or anything else that sets RANK, WORLD_SIZE, MASTER_ADDR) started.

    `device_name` is what the option called `option` gave: auto, cpu or cuda. Seconds are as in the section `parallel`
    of the configuration.

    Raises MythosError if they cannot be reached, or for a device that is not there.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    device = choose_device(device_name, local_rank, local_size, option=option)
    if size == 1:
        return World(device, Ranks(), Ranks())
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise MythosError(
            f"WORLD_SIZE is set ({size}), but {', '.join(missing)} not: start several processes with ./launch.sh "
            "or torchrun, or one without WORLD_SIZE"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    start = timedelta(seconds=start_timeout)
    try:
        store = _meet(timeout)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
            # The agent's store outlives a restart, and with it the addresses of the dead (pytorch#135712). Agents of
            # several machines count restarts differently; launch.sh has them share no store.
            store = dist.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        store.set_timeout(start)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        bound = device if device.type == "cuda" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=start, device_id=bound)
        everyone = list(range(size))
        ranks, storage = (Ranks(dist.new_group(everyone, timeout=start, backend="gloo")) for _ in range(2))
    except (RuntimeError, ValueError) as error:
        raise MythosError(_no_meeting(rank, size, error)) from error
    return World(device, ranks, storage, local_rank, local_size)


def _meet(seconds: float) -> dist.Store:
    """The store that all processes share; raises what torch does, and RuntimeError where it would wait for ever."""
    answers: list[dist.Store | Exception] = []

    def meet() -> None:
        try:
            answers.append(next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))[0])
        except Exception as error:
            answers.append(error)

    # In a thread, because torch waits without limit for something else than a store that listens at the port.
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(2 * seconds + 5)  # it tries twice
    answer = answers[0] if answers else RuntimeError("what listens there is not a run of processes")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _no_meeting(rank: int, size: int, error: Exception) -> str:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return (
            f"rank {rank} cannot listen on {address}, which is in use: set MASTER_PORT to a free port, the same on all "
            "nodes, or end the job that holds it"
        )
    return (
        f"rank {rank} of {size} cannot meet the others at {address}: {short_reason(error).rstrip('.')}. Check "
        "MASTER_ADDR and MASTER_PORT (the first node's, open to the others), and that all nodes were started"
    )


def check_fit(config: Config, size: int) -> None:
    """Raise MythosError if so many processes cannot share the configuration's batches evenly."""
    streams = config.data.streams
    if streams % size:
        fitting = [n for n in range(1, streams + 1) if streams % n == 0]
        nearest = sorted(sorted(fitting, key=lambda n: abs(n - size))[:3])
        raise MythosError(
            f"data.streams: {streams} is not a multiple of the {size} processes. Use a number of processes that "
            f"divides it (nearest: {', '.join(map(str, nearest))}); changing data.streams starts another run."
        )


def check_same_config(config: Config, ranks: Ranks) -> None:
    """Raise MythosError, on every rank, naming the ranks whose configuration is not rank 0's and the first keys."""
    mine = dict(_flat(config.model_dump(mode="json")))
    everyone = ranks.gather(mine)
    lines = []
    for rank, theirs in enumerate(everyone):
        differing = [key for key in mine.keys() | theirs.keys() if theirs.get(key) != everyone[0].get(key)]
        lines += [f"  rank {rank}: {key}={theirs.get(key)!r}, rank 0: {everyone[0].get(key)!r}" for key in differing]
    if lines:
        raise MythosError(
            "the processes were given different configurations:\n"
            + "\n".join(lines[:10])
            + "\nStart every process with the same file and overrides."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def choose_device(name: str, local_rank: int = 0, local_size: int = 1, *, option: str = "train.device") -> torch.device:
    """The device that an option (auto, cpu or cuda) names for this process.

    Raises MythosError for a GPU that is not there, and for fewer GPUs than processes of this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise MythosError(f"{option} is cuda, but torch finds no CUDA GPU: set {option}=auto or cpu")
    if torch.cuda.device_count() < local_size:
        raise MythosError(
            f"{local_size} processes on this machine, which has {torch.cuda.device_count()} GPUs: start one a GPU, or "
            f"set {option}=cpu"
        )
    return torch.device(name, local_rank)
