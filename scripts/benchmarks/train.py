"""Whole training steps: tokens per second, memory, FLOPs executed and needed, and utilisation of the machine."""

import argparse
import contextlib
from functools import partial
from typing import Any, get_args

import torch

from mythos.cli.common import check_least
from mythos.config.sections import Config, ParallelConfig
from mythos.distributed.parallel import compiles
from mythos.errors import MythosError
from mythos.gpu_check.timed_steps import Steps, Work, timed
from mythos.planning.flops import count_parameters
from mythos.progress import aligned
from scripts.benchmarks import open_mythos
from scripts.benchmarks.products import Flops, executed_flops, record_products, replay_cost
from scripts.benchmarks.steps import configuration, memory_of_steps
from scripts.benchmarks.timing import (
    WARM_UP,
    Memory,
    OwnProcess,
    Ratio,
    Timings,
    in_fresh_process,
    in_turns,
    mebibytes,
)

GPU_CALLS = 10
"""Calls of a matmul between two synchronisations with the GPU."""

MODES: tuple[str, ...] = get_args(ParallelConfig.model_fields["activation_checkpointing"].annotation)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("config", metavar="CONFIG.yaml | SIZE", help="a run, a preset, or a size of this benchmark")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--checkpointing", nargs="+", choices=MODES, default=None, help="modes to compare (all; with --against one)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns (7)")
    parser.add_argument("--against", choices=["open-mythos"], help="compare with that package's own training step")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print the tables; return the figures."""
    check_least(options, repeats=1)
    config = configuration(options.config, options.overrides)
    if options.against:
        modes = options.checkpointing or [config.parallel.activation_checkpointing]
        return against(with_mode(config, modes[0]), options.repeats)
    return alone(config, options.checkpointing or MODES, options.repeats)


def with_mode(config: Config, mode: str) -> Config:
    """The configuration with another mode of activation checkpointing."""
    parallel = config.parallel.model_copy(update={"activation_checkpointing": mode})
    return config.model_copy(update={"parallel": parallel})


def describe(steps: Steps) -> str:
    """Describe the step in one line."""
    config, loops = steps.config, sum(steps.loops) / len(steps.loops)
    parameters = count_parameters(config.model)
    return (
        f"{parameters.total:,} parameters ({parameters.active:,} active), {config.train.global_batch} x "
        f"{config.data.sequence_length} tokens in micro-batches of {steps.trainer.micro_batch}, {loops:g} loops on "
        f"average, the last {steps.backprop} with gradient, {str(steps.trainer.parallel.dtype).removeprefix('torch.')} "
        f"on {steps.device.type}"
    )


def alone(config: Config, modes: tuple[str, ...] | list[str], repeats: int) -> dict[str, Any]:
    """Compare modes of activation checkpointing, and the first mode with the matmuls of its step alone."""
    with contextlib.ExitStack() as stack:
        all_steps = {mode: stack.enter_context(Steps(with_mode(config, mode))) for mode in modes}
        first = all_steps[modes[0]]
        print(describe(first))
        flops = {mode: uncompiled(steps, executed_flops) for mode, steps in all_steps.items()}
        products = uncompiled(first, record_products)
        unit = Timings(first.device).unit
        clock = partial(product_seconds, device=first.device, unit=unit)
        roofline: list[float] = []
        # The matmuls take turns with the steps, so that both run under the same load.
        works: dict[str, Work | OwnProcess] = {
            **all_steps, "products": lambda: roofline.append(replay_cost(products, first.device, clock))
        }  # fmt: skip
        timings = in_turns(works, repeats, first.device)
        del timings["products"], roofline[:WARM_UP]
    memory = {mode: in_fresh_process(memory_of_steps, with_mode(config, mode)) for mode in modes}

    needed = first.flops_needed
    rates = [flops[modes[0]].gemms / seconds for seconds in roofline]
    second = "CPU s" if unit == "cpu" else "s"
    rows = [[
        "checkpointing", f"tokens/{second}", "by the clock", f"{second} a step (best)", "peak memory", "in tensors",
        "GFLOP", "/ needed", "attention once", "utilisation",
    ]]  # fmt: skip
    results = {}
    for mode in modes:
        result = figures(first.tokens, timings[mode], needed, flops[mode], rates, memory[mode])
        results[mode] = result
        rows.append([
            mode, f"{result['tokens_per_cost_second']:,.0f}", f"{result['tokens_per_wall_second']:,.0f}",
            f"{timings[mode].median:.3f} ({timings[mode].best:.3f})", mebibytes(memory[mode].peak),
            mebibytes(memory[mode].tensors), f"{flops[mode].total / 1e9:.2f}", f"{result['executed_over_needed']:.3f}",
            f"{result['without_recomputed_scores']:.3f}", f"{result['utilisation']:.1%}",
        ])  # fmt: skip
    print(aligned(rows, left=1))
    share = sorted(seconds / cost for seconds, cost in zip(roofline, timings[modes[0]].costs, strict=True))
    rate = sorted(rates)[len(rates) // 2]
    start = "" if first.device.type == "cuda" else f" of peak memory {mebibytes(memory[modes[0]].start)} are imports;"
    print(
        f"needed {needed / 1e9:.2f} GFLOP a step;{start} the step's matrix products alone, without attention: "
        f"{rate / 1e9:.0f} GFLOP/s, {share[len(share) // 2]:.0%} of the step"
    )
    return {
        "configuration": config.model_dump(mode="json"),
        "flops_needed": needed,
        "gemm_flops_per_second": {"median": rate, "best": max(rates)},
        "products_share_of_step": share[len(share) // 2],
        "modes": results,
    }


def product_seconds(work: Work, device: torch.device, unit: str) -> float:
    """Seconds of one matmul. On a GPU the mean of several queued ones, to leave out the latency of a single call."""
    if device.type != "cuda":
        return getattr(timed(work, device), unit)
    return timed(lambda: [work() for _ in range(GPU_CALLS)], device).wall / GPU_CALLS


def figures(
    tokens: int, timings: Timings, needed: float, flops: Flops, rates: list[float], memory: Memory
) -> dict[str, Any]:
    """The figures of one mode; `rates` is the roofline of each turn in FLOP/s."""
    shares = sorted(needed / cost / rate for cost, rate in zip(timings.costs, rates, strict=True))
    return {
        **timings.record(),
        "tokens_per_cost_second": tokens / timings.median,
        "tokens_per_wall_second": tokens / timings.wall,
        "memory": memory._asdict(),
        "flops_executed": flops._asdict(),
        "executed_over_needed": flops.total / needed,
        "without_recomputed_scores": (flops.total - flops.recomputed) / needed,
        "utilisation": shares[len(shares) // 2],
        "utilisation_range": [shares[0], shares[-1]],
    }


def uncompiled(steps: Steps, count: Any) -> Any:
    """Count a step's matmuls; compiled blocks would hide theirs, so they run in eager mode."""
    if not compiles(steps.config, steps.device):
        return count(steps)
    train = steps.config.train.model_copy(update={"compile": False})
    with Steps(steps.config.model_copy(update={"train": train})) as plain:
        return count(plain)


def against(config: Config, repeats: int) -> dict[str, Any]:
    """Time our step and the other package's in turns, then measure the memory of each."""
    parameters = open_mythos.Steps(config).parameters
    with Steps(config) as ours:
        if ours.device.type == "cuda" or len(set(ours.loops)) > 1 or ours.backprop < ours.loops[0]:
            raise MythosError(
                "--against open-mythos compares steps on a CPU in which every sequence runs all loops with gradient: "
                "set train.device=cpu, depth.sampling=fixed and depth.backprop to the number of loops"
            )
        print(describe(ours))
        print(f"open-mythos: {parameters:,} parameters, its ACT threshold at infinity, so that all loops run")
        tokens = ours.tokens
    with OwnProcess(Steps, config) as mine, OwnProcess(open_mythos.Steps, config) as theirs:
        timings = in_turns({"mythos": mine, "open-mythos": theirs}, repeats)
    memory = {
        "mythos": in_fresh_process(memory_of_steps, config),
        "open-mythos": in_fresh_process(open_mythos.memory_of_steps, config),
    }
    ratio = Ratio.of(timings["open-mythos"], timings["mythos"])
    rows = [
        ["", "tokens/CPU s", "tokens/s", "CPU s a step (best)", "peak memory", "in tensors"],
        *([name, f"{tokens / times.median:,.0f}", f"{tokens / times.wall:,.0f}",
           f"{times.median:.3f} ({times.best:.3f})", mebibytes(memory[name].peak), mebibytes(memory[name].tensors)]
          for name, times in timings.items()),
    ]  # fmt: skip
    print(aligned(rows, left=1))
    our_memory, their_memory = memory["mythos"], memory["open-mythos"]
    assert our_memory.tensors and their_memory.tensors
    resident, tensors = our_memory.peak / their_memory.peak, our_memory.tensors / their_memory.tensors
    print(
        f"mythos is {ratio} times as fast; memory: {resident:.2f} times as much resident (of it "
        f"{mebibytes(our_memory.start)} imports), {tensors:.2f} times in tensors"
    )
    return {
        "configuration": config.model_dump(mode="json"),
        "speed_ratio": ratio._asdict(),
        "memory_ratio": {"resident": resident, "tensors": tensors},
        **{name: {**times.record(), "tokens_per_cost_second": tokens / times.median,
                  "memory": memory[name]._asdict()} for name, times in timings.items()},
    }  # fmt: skip
