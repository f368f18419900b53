"""Where a GPU's time goes, from a profiler's trace."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch.autograd import DeviceType

KINDS = {
    "attention": ("attention", "flash", "fmha", "sdpa", "mha_"),
    "products": (
        *("gemm", "gemv", "cutlass", "nvjet", "cublas", "grouped", "splitk", "_mm", "::mm", "::bmm", "::addmm"),
        *("::baddbmm", "::matmul", "::linear"),
    ),
}
"""Parts of the lower-case names of kernels (on a CPU: operators), by kind; the first kind that matches counts."""
COMMUNICATION = ("nccl",)


class Span(NamedTuple):
    """One run of a kernel."""

    name: str
    start: float
    """Microseconds."""
    end: float


def kernels(events: Iterable[Any]) -> list[Span]:
    """The kernels among a profiler's events, without annotations that span several kernels."""
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith("ProfilerStep")
    ]


def kind(name: str) -> str:
    """The kind of a kernel: a key of KINDS, or others."""
    name = name.lower()
    if name.startswith("triton_") and not name.startswith("triton_tem_"):
        return "others"  # Inductor puts the names of neighbouring matmuls into those of elementwise kernels
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "others")


def union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Intervals during which at least one of the kernels ran, disjoint and sorted."""
    merged: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda span: span.start):
        if merged and span.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], span.end))
        else:
            merged.append((span.start, span.end))
    return merged


def length(intervals: Iterable[tuple[float, float]]) -> float:
    """Total length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def shares(spans: Sequence[Span]) -> dict[str, float]:
    """Share of the time between first and last kernel, by kind; during `gaps` no kernel ran."""
    busy = union(spans)
    whole = busy[-1][1] - busy[0][0]
    by_kind = {"products": 0.0, "attention": 0.0, "others": 0.0}
    for span in spans:
        by_kind[kind(span.name)] += (span.end - span.start) / whole
    return {**by_kind, "gaps": 1 - length(busy) / whole}


def overlap(spans: Sequence[Span]) -> tuple[float, float]:
    """Microseconds of communication, and the part of them during which other kernels ran."""
    sends = [span for span in spans if any(part in span.name.lower() for part in COMMUNICATION)]
    others = [span for span in spans if span not in set(sends)]
    sending = length(union(sends))
    return sending, sending + length(union(others)) - length(union(spans))
