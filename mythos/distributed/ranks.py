"""The processes of a run: how they connect, agree, and disconnect."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from mythos.config.checking import flat_fields
from mythos.config.sections import Config
from mythos.distributed.host_memory import keep_freed_memory
from mythos.errors import MythosError, short_reason
from mythos.files.local import advise
from mythos.torch_internals import has_mesh_placements, set_timeout

T = TypeVar("T")


class Ranks:
    """Communication of the host processes over a gloo group of their own; without a group, a single process.

    All methods, but not the properties, are collective: all ranks call them, in the same order. Values travel pickled,
    between processes of one run, and are never written to a disk.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints, and writes shared files."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in rank order."""
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

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true on any rank; one all-reduce for all of them."""
        if self.group is None:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.group)
        return votes.bool().tolist()

    def agreed(self, action: Callable[[], T]) -> T:
        """Run an action on every rank. If it fails on any, all ranks raise MythosError instead of waiting for it.

        The error has every rank's message; equal ones appear once.
        """
        if self.group is None:
            return action()
        result, problem = None, None
        try:
            result = action()
        except MythosError as error:
            problem = str(error)
        except OSError as error:
            problem = advise(error)
        problems = self.gather(problem)
        distinct = dict.fromkeys(text for text in problems if text is not None)
        if distinct:
            lines = [text if problems[0] == text else f"rank {problems.index(text)}: {text}" for text in distinct]
            raise MythosError("\n".join(lines))
        return cast(T, result)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.group is not None:
            dist.barrier(self.group)


@dataclass
class World:
    """All processes of the run, as seen by this one, from :func:`join_world` or :func:`meet_world`.

    End it with :meth:`leave`.
    """

    device: torch.device
    ranks: Ranks
    """For agreements of the main thread."""
    storage: Ranks
    """The same processes over a second group, for the thread that writes checkpoints during training."""
    local_rank: int = 0
    local_size: int = 1
    """Processes on this machine."""
    device_groups: list[dist.ProcessGroup | None] = field(default_factory=lambda: [None])
    """Groups of the devices' collectives; None is the default group."""

    @property
    def rank(self) -> int:
        """Index of this process, from 0."""
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
        """Run an action first on one process of each machine, then on the others, which reuse the caches it has filled.

        Raises MythosError on all ranks if one does.
        """
        first = self.ranks.agreed(lambda: action() if self.local_rank == 0 else None)
        others = self.ranks.agreed(lambda: action() if self.local_rank != 0 else None)
        return cast(T, first if self.local_rank == 0 else others)

    def add_groups(self, groups: list[dist.ProcessGroup], timeout: float) -> None:
        """Add groups of the devices' collectives, and let these fail after `timeout` seconds."""
        for group in groups:
            set_timeout(group, timeout)
        self.device_groups += groups

    def set_timeouts(self, devices: float, hosts: float) -> None:
        """Set the timeouts, in seconds, of later collectives of the devices and of the hosts' agreements.

        The group for checkpoints keeps its first timeout, because disks may be slow.
        """
        if self.size > 1:
            for group in self.device_groups:
                set_timeout(group, devices)
            set_timeout(self.ranks.group, hosts)

    def leave(self) -> None:
        """Disconnect together. Without the barrier, a process that ends early would cut off the others' messages."""
        if self.size > 1:
            self.ranks.barrier()
            dist.destroy_process_group()
            # A group's threads end with the last reference to it. A thread that still has a tensor of the last
            # collective when Python ends aborts the process (https://github.com/pytorch/pytorch/issues/190489). A
            # model may keep the devices' groups longer, which is safe: their last collective is long over.
            self.ranks.group = self.storage.group = None
            self.device_groups = []


def join_world(config: Config) -> World:
    """Connect the processes of a run, and check that they were started alike.

    Raises MythosError as `meet_world`, if the configuration does not fit the number of processes, and if two ranks have
    different configurations.
    """
    parallel = config.parallel
    world = meet_world(config.train.device, start_timeout=parallel.start_timeout, timeout=parallel.timeout)
    check_fit(config, world.size)
    if world.size > 1:
        check_same_config(config, world.ranks)
    if world.device.type == "cpu":
        keep_freed_memory()
    return world


def meet_world(
    device_name: str, *, start_timeout: float = 1800.0, timeout: float = 300.0, option: str = "train.device"
) -> World:
    """Connect the processes that torchrun (or anything else that sets RANK, WORLD_SIZE, MASTER_ADDR) has started.

    `device_name` is auto, cpu or cuda, from the option `option`. Timeouts are in seconds, as in the section `parallel`
    of the configuration.

    Raises MythosError if processes cannot be reached, or if there is no such device.
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
            # The store of torchrun's agent outlives a restart, with the addresses of dead processes (pytorch#135712).
            # Agents of several machines count restarts differently; for those, launch.sh disables the shared store.
            store = dist.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        store.set_timeout(start)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        bound = device if device.type == "cuda" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=start, device_id=bound)
        everyone = list(range(size))
        ranks, storage = (Ranks(dist.new_group(everyone, timeout=start, backend="gloo")) for _ in range(2))
    except (RuntimeError, ValueError) as error:
        raise MythosError(_meeting_failed(rank, size, error)) from error
    return World(device, ranks, storage, local_rank, local_size)


def _meet(seconds: float) -> dist.Store:
    """The store that all processes share. Raises torch's errors, and RuntimeError where torch would wait for ever."""
    answers: list[dist.Store | Exception] = []

    def meet() -> None:
        try:
            answers.append(next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))[0])
        except Exception as error:
            answers.append(error)

    # In a thread, because torch waits without limit if another kind of server listens at the port.
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(2 * seconds + 5)  # torch tries twice
    answer = answers[0] if answers else RuntimeError("another kind of server listens there")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _meeting_failed(rank: int, size: int, error: Exception) -> str:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return (
            f"rank {rank} cannot listen on {address}, which is in use: set MASTER_PORT to a free port, the same on all "
            "nodes, or end the job that holds it"
        )
    return (
        f"rank {rank} of {size} cannot connect to the other ranks at {address}: {short_reason(error).rstrip('.')}. "
        "Check MASTER_ADDR and MASTER_PORT (the first node's, open to the others), and that all nodes were started"
    )


def check_fit(config: Config, size: int) -> None:
    """Raise MythosError, naming all reasons, if `size` processes cannot share the streams evenly, or the experts."""
    streams, expert = config.data.streams, config.parallel.expert
    problems = []
    if streams % size:
        fitting = [n for n in range(1, streams + 1) if streams % n == 0]
        nearest = sorted(sorted(fitting, key=lambda n: abs(n - size))[:3])
        problems.append(
            f"data.streams: {streams} is not a multiple of the {size} processes. Use a number of processes (in "
            f"plans --ranks or --gpus) that divides it (nearest: {', '.join(map(str, nearest))}); changing "
            "data.streams starts another run."
        )
    if size % expert:
        processes = "1 process" if size == 1 else f"{size} processes"
        problems.append(
            f"parallel.expert: got {expert} and {processes}; the first must divide the number of processes. Start a "
            f"multiple of {expert} (in plans --ranks or --gpus), or set parallel.expert to a divisor of both that "
            "number and model.n_experts"
        )
    if expert > 1 and not has_mesh_placements():
        problems.append(
            f"parallel.expert: got {expert} with torch {torch.__version__}; expert parallelism needs torch 2.13 or "
            "later. Install it, or set parallel.expert=1"
        )
    if problems:
        raise MythosError("\n".join(problems))


def check_same_config(config: Config, ranks: Ranks) -> None:
    """Raise MythosError, on every rank, if configurations differ; it names the ranks and the first ten keys."""
    everyone = ranks.gather(dict(flat_fields(config.model_dump(mode="json"))))
    expected = everyone[0]
    lines = []
    for rank, values in enumerate(everyone):
        differing = [key for key in sorted(expected.keys() | values.keys()) if values.get(key) != expected.get(key)]
        lines += [f"  rank {rank}: {key}={values.get(key)!r}, rank 0: {expected.get(key)!r}" for key in differing]
    if lines:
        raise MythosError(
            "the processes have different configurations:\n"
            + "\n".join(lines[:10])
            + "\nStart every process with the same file and overrides."
        )


def choose_device(name: str, local_rank: int = 0, local_size: int = 1, *, option: str = "train.device") -> torch.device:
    """This process's device, by the value of an option: auto, cpu or cuda.

    Raises MythosError if there is no GPU, and if there are fewer GPUs than processes on this machine.
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
