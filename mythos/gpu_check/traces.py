"""What a profiler's trace says of a GPU's time."""

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
"""Parts of the names of kernels, and of operators on a CPU, in lower case; the first kind that fits counts."""
COMMUNICATION = ("nccl",)


class Span(NamedTuple):
    """A kernel that ran."""

    name: str
    start: float
    """Microseconds."""
    end: float


def kernels(events: Iterable[Any]) -> list[Span]:
    """The kernels among a profiler's events, without the marks that span several of them."""
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith("ProfilerStep")
    ]


def kind(name: str) -> str:
    """What a kernel is for."""
    name = name.lower()
    if name.startswith("triton_") and not name.startswith("triton_tem_"):
        return "others"  # Inductor names elementwise kernels after the products that they stand beside as well
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "others")


def union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Times during which at least one of the kernels ran, disjoint and in order."""
    merged: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda span: span.start):
        if merged and span.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], span.end))
        else:
            merged.append((span.start, span.end))
    return merged


def length(times: Iterable[tuple[float, float]]) -> float:
    """Sum of disjoint times."""
    return sum(end - start for start, end in times)


def shares(spans: Sequence[Span]) -> dict[str, float]:
    """Share of the time from the first kernel to the last that each kind took, and that no kernel ran (`gaps`)."""
    busy = union(spans)
    whole = busy[-1][1] - busy[0][0]
    found = {"products": 0.0, "attention": 0.0, "others": 0.0}
    for span in spans:
        found[kind(span.name)] += (span.end - span.start) / whole
    return {**found, "gaps": 1 - length(busy) / whole}


def overlap(spans: Sequence[Span]) -> tuple[float, float]:
    """Microseconds of communication, and of those during which other kernels ran as well."""
    sends = [span for span in spans if any(part in span.name.lower() for part in COMMUNICATION)]
    others = [span for span in spans if span not in set(sends)]
    sending = length(union(sends))
    return sending, sending + length(union(others)) - length(union(spans))
