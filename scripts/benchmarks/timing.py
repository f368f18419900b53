"""Shared by all benchmarks: pinning to cores, timing in turns, memory of a fresh process, and JSON."""

import gc
import json
import multiprocessing
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import torch

from mythos.errors import MythosError
from mythos.gpu_check.timed_steps import Seconds, Work, timed
from mythos.progress import progress_bar
from mythos.training import measurements

T = TypeVar("T")

WARM_UP = 2
"""Untimed runs before the first turn, which fill allocators and caches and build kernels."""
NO_MEMORY = "the process that is measured died, most likely for lack of memory: give a smaller model or batch"


class Timings:
    """The timed runs of one piece of work, one per turn."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.runs: list[Seconds] = []
        # On a CPU wall time includes other processes on the same core, CPU time does not. On a GPU CPU time is only the
        # time for launches.
        self.unit = "wall" if device is not None and device.type == "cuda" else "cpu"

    @property
    def costs(self) -> list[float]:
        """Seconds of each run: CPU time, or wall time on a GPU."""
        return [getattr(run, self.unit) for run in self.runs]

    @property
    def median(self) -> float:
        """Median of :attr:`costs`."""
        return statistics.median(self.costs)

    @property
    def best(self) -> float:
        """Minimum of :attr:`costs`."""
        return min(self.costs)

    @property
    def wall(self) -> float:
        """Median wall time."""
        return statistics.median(run.wall for run in self.runs)

    def record(self) -> dict[str, Any]:
        """Median, best and number of runs for both clocks, for JSON."""
        clocks = {"cpu_seconds": [run.cpu for run in self.runs], "wall_seconds": [run.wall for run in self.runs]}
        return {
            name: {"median": statistics.median(values), "best": min(values), "runs": len(values)}
            for name, values in clocks.items()
        }


class Ratio(NamedTuple):
    """Ratio of the costs of two pieces of work that were both timed in every turn."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Timings, below: Timings) -> "Ratio":
        """Take the ratio of each turn, in which both ran under the same load."""
        ratios = [one / other for one, other in zip(above.costs, below.costs, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class OwnProcess:
    """Work that takes its turns in a separate process, so that other works do not share its memory.

    The process inherits the cores and threads of this one. There the work is created by `make(*arguments)`, where
    `make` is a function of a module.
    """

    def __init__(self, make: Callable[..., Work], *arguments: Any) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._ask(_create, torch.get_num_threads(), make, arguments)

    def timed(self) -> Seconds:
        """Run the work once."""
        return self._ask(_run_created)

    def _ask(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise MythosError(NO_MEMORY) from error

    def __enter__(self) -> "OwnProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown()


_created: list[Work] = []


def _create(threads: int, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    _created.append(make(*arguments))


def _run_created() -> Seconds:
    gc.collect()
    return timed(_created[0])


def in_turns(
    works: Mapping[str, Work | OwnProcess], repeats: int, device: torch.device | None = None, warm_up: int = WARM_UP
) -> dict[str, Timings]:
    """Time every work once per turn (A B A B ...) for `repeats` turns."""
    timings = {name: Timings(device) for name in works}
    bar: Any
    with progress_bar(total=len(works) * (repeats + warm_up), unit="run", desc="measuring", leave=False) as bar:
        for turn in range(-warm_up, repeats):
            gc.collect()  # so that it does not happen during a run
            for name, work in works.items():
                seconds = work.timed() if isinstance(work, OwnProcess) else timed(work, device)
                bar.update()
                if turn >= 0:
                    timings[name].runs.append(seconds)
    return timings


def pin(cores: Sequence[int]) -> None:
    """Restrict this process to these cores, with one thread of torch for each.

    Raises MythosError for cores that this process may not use.
    """
    torch.set_num_threads(len(cores))
    if hasattr(os, "sched_setaffinity"):
        allowed = usable_cores()
        if not set(cores) <= set(allowed):
            raise MythosError(f"--cores: got {_listed(cores)}; allowed: {_listed(allowed)}")
        os.sched_setaffinity(0, cores)


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def core_numbers(text: str) -> list[int]:
    """Parse a list of cores such as 0,2. Raises MythosError for anything else."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise MythosError(f"--cores: got {text!r}; give numbers of cores, e.g. 0 or 0,1; allowed: "
                          f"{_listed(usable_cores())}")  # fmt: skip
    return sorted({int(part) for part in parts})


def _listed(cores: Iterable[int]) -> str:
    return ",".join(map(str, cores))


def in_fresh_process(work: Callable[..., T], *arguments: Any) -> T:
    """Call a function of a module in a new process, which inherits the cores and threads of this one.

    Raises MythosError if the process dies, for instance for lack of memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_run_alone, work, torch.get_num_threads(), *arguments).result()
        except BrokenProcessPool as error:
            raise MythosError(NO_MEMORY) from error


def _run_alone(work: Callable[..., T], threads: int, *arguments: Any) -> T:
    torch.set_num_threads(threads)
    return work(*arguments)


class Memory(NamedTuple):
    """Memory of a process, in bytes."""

    start: int
    """Resident memory before the work: Python and its packages. 0 on a GPU."""
    peak: int
    """Peak of resident memory, or of memory allocated on a GPU."""
    tensors: int | None
    """Peak of tensor memory in one run, from the allocator's record. It is exact and repeatable, while resident memory
    depends on when the C library returns pages. None if it was not recorded."""


def peak_memory(device: torch.device, start: int, work: Work, runs: int = 3) -> Memory:
    """Run the work and measure the peak memory of this process; `start` is its resident memory before."""
    for _ in range(runs):
        work()
    if device.type == "cuda":
        return Memory(0, torch.cuda.max_memory_allocated(device), None)
    return Memory(start, most_resident_bytes(), None)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def most_resident_bytes() -> int:
    """Peak of the resident memory of this process so far."""
    # Prefer /proc to getrusage, whose peak starts at the size of the parent process.
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(peak[1]) * 1024 if peak else measurements.peak_memory(torch.device("cpu"))


def mebibytes(size: int | None) -> str:
    """A size for tables; - if it is unknown."""
    return "-" if size is None else f"{size / 2**20:,.0f} MiB"


def machine() -> dict[str, Any]:
    """The machine that figures depend on: processor, cores in use, versions, load."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "bfloat16": [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def write_report(path: Path, what: str, arguments: Sequence[str], results: Mapping[str, Any]) -> None:
    """Write a benchmark's figures and the machine to a file that :func:`check_writable` has accepted."""
    report = {"benchmark": what, "arguments": list(arguments), "machine": machine(), "results": results}
    path.write_text(json.dumps(report, indent=2) + "\n")


def check_writable(path: Path) -> None:
    """Raise MythosError if a report cannot be written, before minutes are spent on measuring."""
    problem = "it is a folder" if path.is_dir() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = str(error)
    if not problem and not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "permission denied"
    if problem:
        raise MythosError(f"{path} cannot be written: {problem}. Give another file with --json.")
