"""What the benchmarks share: pinned cores, two clocks, turns, memory of a fresh process, tables and JSON."""

import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from mythos.errors import MythosError
from mythos.progress import progress_bar

T = TypeVar("T")
Work = Callable[[], object]

WARM_UP = 2
"""Untimed runs before the first turn: allocators, caches and lazily built kernels are then as they stay."""


NO_MEMORY = "the process that is measured died, most likely for lack of memory: give a smaller model or batch"


class Seconds(NamedTuple):
    """What one run took."""

    cpu: float
    """Of all threads of this process."""
    wall: float


class Timings:
    """The runs of one thing, in the order of the turns."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.runs: list[Seconds] = []
        # On a CPU other processes take turns on the core, which the clock on the wall counts and CPU time does not. A
        # GPU works while the CPU has only sent it there.
        self.unit = "wall" if device is not None and device.type == "cuda" else "cpu"

    @property
    def costs(self) -> list[float]:
        """Seconds of each run that count: of the CPU, or on the wall where the device is a GPU."""
        return [getattr(run, self.unit) for run in self.runs]

    @property
    def median(self) -> float:
        """Median of :attr:`costs`."""
        return statistics.median(self.costs)

    @property
    def best(self) -> float:
        """Least of :attr:`costs`."""
        return min(self.costs)

    @property
    def wall(self) -> float:
        """Median seconds on the wall."""
        return statistics.median(run.wall for run in self.runs)

    def record(self) -> dict[str, Any]:
        """Median, best and number of runs by both clocks, for JSON."""
        clocks = {"cpu_seconds": [run.cpu for run in self.runs], "wall_seconds": [run.wall for run in self.runs]}
        return {
            name: {"median": statistics.median(values), "best": min(values), "runs": len(values)}
            for name, values in clocks.items()
        }


class Ratio(NamedTuple):
    """How many times as much one thing took as another, both measured in every turn."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Timings, below: Timings) -> "Ratio":
        """Ratios turn by turn: what slows the machine for a while slows both."""
        ratios = [one / other for one, other in zip(above.costs, below.costs, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def timed(work: Work, device: torch.device | None = None) -> Seconds:
    """Run something once, and on a GPU wait for its end."""
    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


class OwnProcess:
    """A work that takes its turns in a process of its own, where nothing of the other works' lies in its way.

    It inherits the cores and threads of this one. `make(*arguments)`, of a module, gives the work there.
    """

    def __init__(self, make: Callable[..., Work], *arguments: Any) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._ask(_begin, torch.get_num_threads(), make, arguments)

    def timed(self) -> Seconds:
        """Run it once."""
        return self._ask(_run_begun)

    def _ask(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise MythosError(NO_MEMORY) from error

    def __enter__(self) -> "OwnProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown()


_begun: list[Work] = []


def _begin(threads: int, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    _begun.append(make(*arguments))


def _run_begun() -> Seconds:
    gc.collect()
    return timed(_begun[0])


def in_turns(
    works: Mapping[str, Work | OwnProcess], repeats: int, device: torch.device | None = None, warm_up: int = WARM_UP
) -> dict[str, Timings]:
    """Run every work once a turn, A B A B, for `repeats` turns, and tell what each took."""
    timings = {name: Timings(device) for name in works}
    with progress_bar(total=len(works) * (repeats + warm_up), unit="run", desc="measuring", leave=False) as bar:
        for turn in range(-warm_up, repeats):
            gc.collect()  # here, and not in the middle of a run
            for name, work in works.items():
                seconds = work.timed() if isinstance(work, OwnProcess) else timed(work, device)
                bar.update()
                if turn >= 0:
                    timings[name].runs.append(seconds)
    return timings


def pin(cores: Sequence[int]) -> None:
    """Let this process run on these cores only, with a thread of torch on each.

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
    """Parse 0,2 as numbers of cores. Raises MythosError for anything else."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise MythosError(f"--cores: got {text!r}; give numbers of cores, e.g. 0 or 0,1; allowed: "
                          f"{_listed(usable_cores())}")  # fmt: skip
    return sorted({int(part) for part in parts})


def _listed(cores: Iterable[int]) -> str:
    return ",".join(map(str, cores))


def in_fresh_process(work: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module returns in a process of its own, which inherits the cores and threads of this one.

    Raises MythosError where the process dies, for instance for lack of memory.
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
    """What a process needed, in bytes."""

    start: int
    """Resident before the work: Python and its packages."""
    peak: int
    """Most that was resident (on a GPU: most that was allocated on it, and `start` is 0)."""
    tensors: int | None
    """Most that tensors held at one moment of the last run, from the allocator's own record: exact and repeatable,
    where the resident size depends on how the C library returns pages. None if it was not recorded."""


def peak_memory(device: torch.device, start: int, work: Work, runs: int = 3) -> Memory:
    """Run something, and tell the most this process has held so far; `start` is what was resident before it."""
    for _ in range(runs):
        work()
    if device.type == "cuda":
        return Memory(0, torch.cuda.max_memory_allocated(device), None)
    return Memory(start, most_resident_bytes(), None)


def resident_bytes() -> int:
    """What this process holds in memory now."""
    return _status("VmRSS") or _greatest_size()


def most_resident_bytes() -> int:
    """Most that this process has held in memory so far."""
    # Not what getrusage says, where there is something else: that begins with the size of the process that started it.
    return _status("VmHWM") or _greatest_size()


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def _greatest_size() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tensor_peak(work: Work) -> int:
    """Most bytes by which the CPU tensors that exist grow at any moment of a run, as torch's allocator counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    results = trace.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What tensors hold, shared storage counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def mebibytes(size: int | None) -> str:
    """For tables."""
    return "-" if size is None else f"{size / 2**20:,.0f} MiB"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str] = ()) -> None:
    """Print columns; the first and those named in `words` to the left, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_left = [place == 0 or title in words for place, title in enumerate(header)]
    for line in lines:
        cells = zip(line, widths, to_left, strict=True)
        print("  ".join(text.ljust(width) if left else text.rjust(width) for text, width, left in cells).rstrip())


def machine() -> dict[str, Any]:
    """What figures depend on: processor, cores in use, versions, load."""
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
    """Write a benchmark's figures with the machine they are from, to a file that :func:`check_writable` let pass."""
    report = {"benchmark": what, "arguments": list(arguments), "machine": machine(), "results": results}
    path.write_text(json.dumps(report, indent=2) + "\n")


def check_writable(path: Path) -> None:
    """Raise MythosError, before minutes are spent, where a report could not be written."""
    problem = "it is a folder" if path.is_dir() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = str(error)
    if not problem and not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "permission denied"
    if problem:
        raise MythosError(f"{path} cannot be written: {problem}. Give another file with --json.")
