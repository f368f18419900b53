"""Timing in turns, memory and reports of the benchmarks."""

import json
import os
import time

import pytest
import torch

from mythos.errors import MythosError
from mythos.gpu_check.timed_steps import Seconds
from scripts.benchmarks import timing
from scripts.benchmarks.timing import Ratio, Timings


def timings(*costs: float) -> Timings:
    times = Timings()
    times.runs = [Seconds(cost, 10 * cost) for cost in costs]
    return times


def test_works_take_turns_and_the_first_turns_do_not_count():
    done: list[str] = []
    measured = timing.in_turns({name: lambda n=name: done.append(n) for name in "ab"}, repeats=2, warm_up=1)
    assert done == list("ababab")
    assert {name: len(times.runs) for name, times in measured.items()} == {"a": 2, "b": 2}


def test_timings_by_both_clocks():
    times = timings(3.0, 1.0, 2.0)
    assert (times.median, times.best, times.wall) == (2.0, 1.0, 20.0)
    assert times.record() == {
        "cpu_seconds": {"median": 2.0, "best": 1.0, "runs": 3},
        "wall_seconds": {"median": 20.0, "best": 10.0, "runs": 3},
    }
    on_gpu = Timings(torch.device("cuda"))
    on_gpu.runs = times.runs
    assert on_gpu.median == 20.0


def test_ratios_are_those_of_the_same_turn():
    ratio = Ratio.of(timings(2.0, 40.0, 9.0), timings(1.0, 10.0, 3.0))
    assert ratio == (3.0, 2.0, 4.0)
    assert str(ratio) == "3.00 (2.00 to 4.00)"


def resident_after(size: int) -> tuple[int, int]:
    before = timing.resident_bytes()
    torch.ones(size, dtype=torch.uint8)
    return timing.most_resident_bytes() - before, torch.get_num_threads()


def die() -> None:
    os._exit(1)


def test_memory_of_a_fresh_process():
    size = 100 * 2**20
    keep = torch.ones(3 * size, dtype=torch.uint8)  # nothing of this process is counted
    peak, threads = timing.in_fresh_process(resident_after, size)
    assert size <= peak < 1.3 * size < len(keep)
    assert threads == torch.get_num_threads()
    with pytest.raises(MythosError, match="the process that is measured died"):
        timing.in_fresh_process(die)


class Sleeper:
    """Work that takes longer with every run, in another process than its parent's."""

    def __init__(self, seconds: float, parent: int) -> None:
        assert os.getpid() != parent
        self.seconds = seconds
        self.runs = 0

    def __call__(self) -> None:
        self.runs += 1
        time.sleep(self.seconds * self.runs)


def test_turns_of_works_in_their_own_processes():
    with timing.OwnProcess(Sleeper, 0.05, os.getpid()) as slow, timing.OwnProcess(Sleeper, 0.01, os.getpid()) as quick:
        measured = timing.in_turns({"slow": slow, "quick": quick}, repeats=2, warm_up=0)
    # The same object in each turn, so that the second one sleeps longer. A busy machine may only make it longer still.
    for name, least in (("slow", (0.05, 0.1)), ("quick", (0.01, 0.02))):
        assert all(run.wall > 0.99 * seconds for run, seconds in zip(measured[name].runs, least, strict=True))
    assert all(run.cpu < 0.05 for run in measured["slow"].runs)
    with pytest.raises(MythosError, match="the process that is measured died"):
        timing.OwnProcess(die)


@pytest.mark.parametrize("text", ["x", "0,", "-1", "1.5", ""])
def test_cores_that_are_no_numbers(text):
    with pytest.raises(MythosError, match=r"--cores: got .*; give numbers of cores"):
        timing.core_numbers(text)


def test_cores_that_are_not_there():
    assert timing.core_numbers("2,0,2") == [0, 2]
    with pytest.raises(MythosError, match=r"--cores: got 4095; allowed: "):
        timing.pin([4095])


def test_a_report_names_the_machine(tmp_path):
    path = tmp_path / "new" / "train.json"
    timing.check_writable(path)
    assert not path.exists()
    timing.write_report(path, "train", ["reference"], {"speed": 1.5})
    report = json.loads(path.read_text())
    assert (report["benchmark"], report["arguments"], report["results"]) == ("train", ["reference"], {"speed": 1.5})
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()


def test_a_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "train.json"):
        with pytest.raises(MythosError, match=r"cannot be written: .* Give another file with --json"):
            timing.check_writable(path)
