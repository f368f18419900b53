"""Tokens per second of training steps, and what the GPU's time goes to."""

import json
import statistics
from collections.abc import Iterator
from functools import cache

import torch
from torch.profiler import ProfilerActivity, profile

from mythos.benchmarks.steps import Steps
from mythos.benchmarks.timing import timed
from mythos.gpu_check import traces
from mythos.gpu_check.catalog import MICRO_BATCHES
from mythos.gpu_check.result import PROFILE, RATES, Result, Setting, judged, not_run
from mythos.gpu_check.runs import planned_bytes, seconds_left, steps_of, too_large
from mythos.training.measurements import peak_flops

WARM_UP = 3
STEPS = 8
"""Steps that are timed, fewer where time runs out."""
ROWS_OF_TABLE = 40


def throughput(setting: Setting, *, preset: str, rows: int, compiled: bool) -> Iterator[Result]:
    """Whole optimizer steps at the preset's own depth."""
    config = steps_of(setting, preset, rows, f"train.compile={str(compiled).lower()}")
    if refused := fits_not(setting, preset, rows):
        yield refused
        return
    with Steps(config) as steps:
        for _ in range(WARM_UP if setting.cuda else 1):
            steps()
        seconds = [timed(steps, setting.device).wall]
        while len(seconds) < (STEPS if setting.cuda else 2) and seconds_left(setting) > seconds[0]:
            seconds.append(timed(steps, setting.device).wall)
        rate = steps.tokens / statistics.median(seconds)
        peak = peak_flops(setting.device, steps.trainer.parallel.dtype)
        mfu = f", MFU {rate * steps.flops_needed / steps.tokens / peak:.1%}" if peak else ""
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if setting.cuda else ""
    eager = remember(setting, f"{preset} {rows}{' compiled' * compiled}", rate).get(f"{preset} {rows}")
    compared = f", {rate / eager:.2f} times eager" if compiled and eager else ""
    told = f"{rate:,.0f} tokens/s{mfu}{memory}{compared}, {len(seconds)} steps"
    # On a CPU nothing is really compiled.
    yield judged(not (setting.cuda and compiled and eager) or rate > eager, told)


@cache
def fits_not(setting: Setting, preset: str, rows: int) -> Result | None:
    """That a step does not fit on the GPU, where it does not; to plan it takes seconds."""
    return too_large(setting, planned_bytes(steps_of(setting, preset, rows))[0]) if setting.cuda else None


def remember(setting: Setting, name: str, rate: float) -> dict[str, float]:
    """Rates so far, this one included: in a file, because a process may have died since."""
    path = setting.scratch / RATES
    path.parent.mkdir(exist_ok=True)
    rates = json.loads(path.read_text()) if path.exists() else {}
    rates[name] = rate
    path.write_text(json.dumps(rates))
    return rates


def shares(setting: Setting, *, preset: str, compiled: bool) -> Iterator[Result]:
    """A profile of two steps."""
    rows = MICRO_BATCHES[preset][0]
    config = steps_of(setting, preset, rows, f"train.compile={str(compiled).lower()}")
    if refused := fits_not(setting, preset, rows):
        yield from [refused] * 4
        return
    # Of the CPU's calls too, the trace would slow the launches down, and make gaps of its own.
    activities = [ProfilerActivity.CUDA if setting.cuda else ProfilerActivity.CPU]
    with Steps(config) as steps:
        for _ in range(WARM_UP if setting.cuda else 1):
            steps()
        with profile(activities=activities) as trace:
            for _ in range(2 if setting.cuda else 1):
                steps()
            if setting.cuda:
                torch.cuda.synchronize()
    averages = trace.key_averages()
    by = "self_device_time_total" if setting.cuda else "self_cpu_time_total"
    table = averages.table(sort_by=by, row_limit=ROWS_OF_TABLE, max_name_column_width=90)
    with (setting.out / PROFILE).open("a", encoding="utf-8") as file:
        file.write(f"{preset}, {'compiled' if compiled else 'eager'}, {setting.device.type}\n{table}\n\n")

    if setting.cuda:
        spans = traces.kernels(trace.events())
        if not spans:
            raise RuntimeError("the profiler saw no kernel: CUPTI may be missing, or not allowed to this user")
        found = traces.shares(spans)
        names = ("products", "attention", "others", "gaps")
        yield from (judged(True, f"{found[name]:.1%}") for name in names)
        return
    times: dict[str, float] = {"products": 0.0, "attention": 0.0, "others": 0.0}
    for average in averages:
        times[traces.kind(average.key)] += average.self_cpu_time_total
    yield from (judged(True, f"{time / sum(times.values()):.1%} of CPU time") for time in times.values())
    yield not_run("a CPU has no gaps between kernels")
