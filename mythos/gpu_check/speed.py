"""Tokens per second of training steps, and what the GPU's time is spent on."""

import json
import statistics
import time
from collections.abc import Iterator
from functools import cache

import torch
from torch.profiler import ProfilerActivity, profile

from mythos.gpu_check import traces
from mythos.gpu_check.catalog import MICRO_BATCHES
from mythos.gpu_check.result import PROFILE, RATES, Result, Setting, judged, not_run
from mythos.gpu_check.runs import planned_bytes, steps_of, too_large
from mythos.gpu_check.timed_steps import Steps, timed
from mythos.training.measurements import peak_flops

WARM_UP = 3
STEPS = 8
"""Steps that are timed, fewer if time runs out."""
TABLE_ROWS = 40


def throughput(setting: Setting, *, preset: str, rows: int, compiled: bool) -> Iterator[Result]:
    """Time whole optimizer steps at the preset's own depth."""
    config = steps_of(setting, preset, rows, train__compile=compiled)
    if refused := does_not_fit(setting, preset, rows):
        yield refused
        return
    with Steps(config) as steps:
        for _ in range(WARM_UP if setting.cuda else 1):
            steps()
        seconds = [timed(steps, setting.device).wall]
        while len(seconds) < (STEPS if setting.cuda else 2) and setting.deadline - time.time() > seconds[0]:
            seconds.append(timed(steps, setting.device).wall)
        rate = steps.tokens / statistics.median(seconds)
        peak = peak_flops(setting.device, steps.trainer.parallel.dtype)
        mfu = f", MFU {rate * steps.flops_needed / steps.tokens / peak:.1%}" if peak else ""
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if setting.cuda else ""
    eager = save_rate(setting, f"{preset} {rows}{' compiled' * compiled}", rate).get(f"{preset} {rows}")
    compared = f", {rate / eager:.2f} times eager" if compiled and eager else ""
    measured = f"{rate:,.0f} tokens/s{mfu}{memory}{compared}, {len(seconds)} steps"
    # On a CPU nothing is really compiled, see `stage.prepare`.
    yield judged(not (setting.cuda and compiled and eager) or rate > eager, measured)


@cache
def does_not_fit(setting: Setting, preset: str, rows: int) -> Result | None:
    """The result of a check whose step does not fit on the GPU, else None; cached, because planning takes seconds."""
    return too_large(setting, planned_bytes(steps_of(setting, preset, rows))[0]) if setting.cuda else None


def save_rate(setting: Setting, name: str, rate: float) -> dict[str, float]:
    """Add a rate to those measured so far and return all; they are in a file, because the process may have changed."""
    path = setting.scratch / RATES
    path.parent.mkdir(exist_ok=True)
    rates = json.loads(path.read_text()) if path.exists() else {}
    rates[name] = rate
    path.write_text(json.dumps(rates))
    return rates


def shares(setting: Setting, *, preset: str, compiled: bool) -> Iterator[Result]:
    """Profile two steps."""
    rows = MICRO_BATCHES[preset][0]
    config = steps_of(setting, preset, rows, train__compile=compiled)
    if refused := does_not_fit(setting, preset, rows):
        yield from [refused] * 4
        return
    # On a GPU trace only kernels: tracing the CPU's calls too would slow down launches and add gaps.
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
    sort_by = "self_device_time_total" if setting.cuda else "self_cpu_time_total"
    table = averages.table(sort_by=sort_by, row_limit=TABLE_ROWS, max_name_column_width=90)
    with (setting.out / PROFILE).open("a", encoding="utf-8") as file:
        file.write(f"{preset}, {'compiled' if compiled else 'eager'}, {setting.device.type}\n{table}\n\n")

    if setting.cuda:
        spans = traces.kernels(trace.events())
        if not spans:
            raise RuntimeError("the profiler recorded no kernel: CUPTI may be missing, or not allowed to this user")
        by_kind = traces.shares(spans)
        yield from (judged(True, f"{by_kind[kind]:.1%}") for kind in ("products", "attention", "others", "gaps"))
        return
    times: dict[str, float] = {"products": 0.0, "attention": 0.0, "others": 0.0}
    for average in averages:
        times[traces.kind(average.key)] += average.self_cpu_time_total
    yield from (judged(True, f"{time / sum(times.values()):.1%} of CPU time") for time in times.values())
    yield not_run("a CPU has no gaps between kernels")
