"""All checks in the order in which they run, the most important first, in case time runs out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mythos.config.presets import PRESETS, preset_config
from mythos.gpu_check.result import PROFILE

DTYPES = ("bfloat16", "float32")
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest error relative to the largest absolute value of the reference, which is computed in float64.

float32: sums of up to 4,096 products in another order differ by a few 1e-6; a matmul in TF32 would differ by 5e-4.
bfloat16: the reference gets the same rounded inputs; the kernel rounds probabilities and results to 8 bits (0.4% each),
and a gradient is rounded several times."""
MEMORY_PRESETS = ("mythos_small", "mythos_1b", "looped_370m")
MEMORY_MODES = ("none", "selective", "loop", "all")
MEMORY_RATIO = (0.85, 1.15)
"""Allowed ratio of planned to measured memory."""
MICRO_BATCHES = {"mythos_small": (8, 32), "mythos_1b": (1, 4)}
"""Sequences of a micro-batch. They are as long as the preset's context, 2,048 and 4,096 tokens."""
MOST_GRAPHS = 24
"""Most graphs that a run may compile."""
LAST_NEW_GRAPH = 30
"""Last step at which a run may compile a graph."""
TRAINING_STEPS = 200
RECOMPILE_STEPS = 50


class Check(NamedTuple):
    """One line of the report."""

    name: str
    expected: str


@dataclass(frozen=True)
class Task:
    """Checks that one function measures together: `run(setting, **arguments)` yields their results in order."""

    checks: tuple[Check, ...]
    run: str
    """module:function; a module name without a dot is a module of this package."""
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 10.0
    """Expected duration on a GPU. A task does not start if less time is left, and is ended if it takes far longer."""
    on_cpu: bool = True
    """Whether it also runs on a CPU, at tiny size; false if there it would repeat another task."""


class Stage(NamedTuple):
    """Tasks that share a process on a GPU."""

    name: str
    share: float
    """Share of the remaining time, relative to the shares of later stages."""
    tasks: tuple[Task, ...]


def _task(run: str, *checks: tuple[str, str], seconds: float = 10.0, on_cpu: bool = True, **arguments: Any) -> Task:
    """A task from pairs of name and expected result."""
    return Task(tuple(Check(*check) for check in checks), run, arguments, seconds, on_cpu)


def latent_widths() -> dict[tuple[int, int], list[str]]:
    """Presets with latent attention, by the widths of keys and values."""
    presets: dict[tuple[int, int], list[str]] = {}
    for name in PRESETS:
        config = preset_config(name)
        if config.attention == "mla":
            widths = (config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
            presets.setdefault(widths, []).append(name.removeprefix("mythos_"))
    return presets


def _environment() -> Iterator[Task]:
    yield _task("environment:gpus", ("GPUs", "SM80 or newer; SM90 or SM100 for grouped_mm without waits"))
    yield _task(
        "environment:versions",
        ("torch", "2.11 to 2.14"),
        ("CUDA, cuDNN, NCCL, driver", "all found; cuDNN 9.15 or newer"),
        ("Triton and a C compiler", "both found: compiled code and document masking need them"),
        ("Python, mythos", "Python 3.11 to 3.13"),
    )


def _kernels() -> Iterator[Task]:
    widths = {"gqa, heads of 64": (4, 2, 64, 64), "gqa, heads of 128": (4, 2, 128, 128)}
    for (dim, value_dim), presets in latent_widths().items():
        names = ", ".join(presets[:3]) + (f" and {len(presets) - 3} more" if len(presets) > 3 else "")
        widths[f"mla, keys {dim}, values {value_dim} ({names})"] = (4, 4, dim, value_dim)

    def attention(kind: str, dtype: str, expected: str, seconds: float) -> Iterator[Task]:
        for name, (heads, kv_heads, dim, value_dim) in widths.items():
            sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "value_dim": value_dim}
            check = (f"attention, {kind}, {name}, {dtype}", expected)
            yield _task("kernels:attention", check, seconds=seconds, kind=kind, dtype=dtype, **sizes)

    for dtype in DTYPES:
        within = f"output and gradients within {TOLERANCES[dtype]:g}"
        yield from attention("causal", dtype, f"{within}, not by the math kernel", 5)
        yield _task(
            "kernels:grouped",
            (f"grouped_product, empty and tiny experts, {dtype}", f"within {TOLERANCES[dtype]:g}"),
            (f"grouped_outer, empty and tiny experts, {dtype}", f"within {TOLERANCES[dtype]:g}"),
            dtype=dtype,
        )
        routed = (f"routed experts, {what}, {dtype}" for what in ("empty and tiny ones", "choices left out"))
        yield _task("kernels:experts", *((name, within) for name in routed), seconds=30, dtype=dtype)
        for what in ("RMSNorm", "gated", "rotary positions", "cross-entropy"):
            yield _task("kernels:part", (f"{what}, {dtype}", within), what=what, dtype=dtype)
    for dtype in DTYPES:  # last, because each variant of flex attention is compiled
        within = f"output and gradients within {TOLERANCES[dtype]:g}"
        yield from attention("documents", dtype, f"{within}, by flex attention", 15)


def _step() -> Iterator[Task]:
    expected = "none under set_sync_debug_mode('error') (SM90, SM100; else grouped_mm)"
    for preset, compiled in (("mythos_nano", False), ("mythos_small", False), ("mythos_nano", True)):
        yield _task(
            "steps:waits",
            (f"waits in a step, {preset}, {'compiled' if compiled else 'eager'}", expected),
            seconds=60 if compiled else 20,
            on_cpu=(preset, compiled) == ("mythos_nano", False),
            preset=preset,
            compiled=compiled,
        )


def _training() -> Iterator[Task]:
    against_cpu = "first 10 steps within {}, mean of the last 20 within {}"
    resumed = "losses as without the kill: first step after it within 1e-3, last 20 3%"
    yield _task(
        "training:against_cpu",
        ("losses against the CPU's, float32", against_cpu.format("1e-3", "3%")),
        seconds=30,
        dtype="float32",
    )
    yield _task("training:resumed", ("killed and resumed, float32", resumed), seconds=30)
    yield _task(
        "training:against_cpu",
        ("losses against the CPU's, bfloat16", against_cpu.format("2e-2", "6%")),
        seconds=20,
        dtype="bfloat16",
    )
    yield _task(
        "training:against_cpu",
        ("losses against the CPU's, lanes and passes that differ, bfloat16", against_cpu.format("2e-2", "6%")),
        seconds=40,
        dtype="bfloat16",
        varied=True,
    )
    yield _task(
        "training:asynchronous_save",
        ("asynchronous checkpoint, steps meanwhile", "training goes on: a step does not wait for the write"),
        ("asynchronous checkpoint, restored", "equal to what was saved, bit by bit"),
        seconds=20,
    )


def _speed() -> Iterator[Task]:
    for compiled in (False, True):
        how = "compiled" if compiled else "eager"
        for place in range(2):
            for preset, sizes in MICRO_BATCHES.items():
                name = f"tokens/s and MFU, {preset}, micro-batch {sizes[place]}, {how}"
                yield _task(
                    "speed:throughput",
                    (name, "faster than eager" if compiled else "recorded"),
                    seconds=60 if compiled else 20,
                    on_cpu=(preset, place, compiled) == ("mythos_small", 0, False),
                    preset=preset,
                    rows=sizes[place],
                    compiled=compiled,
                )
            if place == 0:
                yield from _shares(how, compiled)


def _shares(how: str, compiled: bool) -> Iterator[Task]:
    for preset in MICRO_BATCHES:
        kinds = ("products", "attention", "elementwise and others", "gaps between kernels")
        yield _task(
            "speed:shares",
            *((f"share of {kind}, {preset}, {how}", f"recorded; table in {PROFILE}") for kind in kinds),
            seconds=40 if compiled else 20,
            on_cpu=(preset, compiled) == ("mythos_1b", False),
            preset=preset,
            compiled=compiled,
        )


def _memory() -> Iterator[Task]:
    low, high = MEMORY_RATIO
    for mode in MEMORY_MODES:
        for preset in MEMORY_PRESETS:
            yield _task(
                "memory:planned",
                (f"memory of a step, {preset}, checkpointing {mode}", f"planned / measured {low:g} to {high:g}"),
                seconds=15,
                on_cpu=(preset, mode) in (("mythos_small", "selective"), ("looped_370m", "none")),
                preset=preset,
                mode=mode,
            )


def _recompiles() -> Iterator[Task]:
    yield _task(
        "steps:recompiles",
        (f"graphs in {RECOMPILE_STEPS} steps of changing depths and two validations", f"at most {MOST_GRAPHS}"),
        ("last step that compiled", f"{LAST_NEW_GRAPH} or before"),
        ("graph breaks", "0"),
        seconds=90,
    )


def _decoding() -> Iterator[Task]:
    yield _task(
        "decoding:greedy",
        ("decoding, tokens/s, eager", "recorded"),
        ("decoding with a cache, float32", "the tokens that whole forward passes predict"),
        seconds=20,
    )
    yield _task("decoding:halting", ("decoding, halting at convergence", "fewer loops and less time"), seconds=20)
    yield _task(
        "decoding:compiled",
        ("decoding, tokens/s, compiled", "faster than eager"),
        ("compiled decoding, float32", "the eager tokens"),
        seconds=60,
    )


def _ranks() -> Iterator[Task]:
    divided = ("expert", "fsdp, experts divided by 2,"), ("shared", "fsdp, experts and shared ones divided by 2,")
    for mode, name in (("ddp", "ddp"), ("fsdp", "fsdp"), ("hsdp", "hsdp"), *divided):
        check = (f"{name} against one process", "losses and gradient norms of 3 steps within 1e-4")
        yield _task("ranks:parity", check, seconds=30, on_cpu=mode in ("fsdp", "expert", "shared"), mode=mode)
    yield _task("ranks:gathers", ("all-gathers of a step, fsdp", "as many at 2 loops as at 4"), seconds=30)
    overlap = ("communication behind computation, fsdp", "recorded: share of its time that is hidden")
    yield _task("ranks:overlap", overlap, seconds=40)


STAGES: tuple[Stage, ...] = (
    Stage("environment", 10, tuple(_environment())),
    Stage("kernels", 120, tuple(_kernels())),
    Stage("step", 35, tuple(_step())),
    Stage("training", 85, tuple(_training())),
    Stage("speed", 110, tuple(_speed())),
    Stage("memory", 50, tuple(_memory())),
    Stage("recompiles", 50, tuple(_recompiles())),
    Stage("decoding", 40, tuple(_decoding())),
    Stage("ranks", 50, tuple(_ranks())),
)


def table(stages: Iterable[Stage] = STAGES) -> str:
    """The checks as a Markdown table, without results."""
    rows = [
        f"| {stage.name} | {check.name} | {check.expected} | not run |"
        for stage in stages
        for task in stage.tasks
        for check in task.checks
    ]
    return "\n".join(["| stage | check | expected | measured |", "|---|---|---|---|", *rows])
