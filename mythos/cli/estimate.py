"""Estimate the cost of training a model: size, FLOPs, memory, time, money.

For a preset assumes a vocabulary of 4,096 if it has none, sequences of its context (at most 8,192 tokens), and 20
tokens per active parameter; override them like fields of a configuration. Finds the layout (fields of parallel, and
train.micro_batch) that fits and is fastest, by a model of matmuls, memory traffic and network. A preset is estimated
under that layout, a configuration under its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos.cli.common import command_parser
from mythos.config.loading import config_from_dict, load_config, overridden, packaged_configs
from mythos.config.presets import PRESETS, preset_config
from mythos.config.sections import Config
from mythos.errors import MythosError

if TYPE_CHECKING:
    from mythos.distributed.layout import Layout
    from mythos.planning.budget import Gpu
    from mythos.planning.rank_state import RankState
    from mythos.planning.search import Found, Least, Search

GIB = 2**30
TOKENS_PER_PARAMETER = 20
"""Length of a run if none is set (arXiv 2203.15556)."""
LONGEST = 8192
"""Maximum tokens of a preset's sequences, unless a length is set."""
PRESET_BATCH = 64
"""Sequences of a preset's global batch, rounded up to a multiple of the GPUs."""


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command, for `parse_intermixed_args`: options may stand between the overrides."""
    parser = command_parser("estimate", __doc__)
    parser.add_argument("config", metavar="CONFIG_or_PRESET", help="configuration of a run, or the name of a preset")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="fields to override")
    parser.add_argument("--gpu", default="H100", help="A100, H100, H200 or B200 (default H100)")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="number of GPUs (default 8)")
    parser.add_argument("--machine-gpus", type=int, default=8, metavar="N", help="GPUs per machine (default 8)")
    parser.add_argument("--tokens", type=float, metavar="N", help="training tokens (default: the run's)")
    parser.add_argument(
        "--mfu", type=float, metavar="SHARE", help="share of the peak FLOP/s (default: from a model of memory traffic)"
    )
    parser.add_argument("--price", type=float, metavar="USD", help="price of a GPU hour (default: a market figure)")
    parser.add_argument("--flops", type=float, metavar="C", help="budget to split (default: that of the run)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the figures, and write the JSON. Raises MythosError like :func:`estimate`, and for `--json`."""
    from mythos.planning.trace_cache import kept_on_disk

    with kept_on_disk():
        figures = estimate(options)
    print(page(figures))
    if options.json:
        try:
            options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise MythosError(
                f"--json: {options.json} cannot be written: {error.strerror}. Give another file."
            ) from error


def estimate(options: argparse.Namespace) -> dict[str, Any]:
    """Compute all figures as JSON values: bytes, seconds, US dollars and FLOPs.

    Raises MythosError for an unknown GPU or preset, numbers out of range, and an invalid configuration.
    """
    import torch

    from mythos.distributed.parallel import compiles
    from mythos.distributed.ranks import check_fit
    from mythos.model.cache import cache_bytes_per_token
    from mythos.planning.budget import named_gpu, optimal_split
    from mythos.planning.flops import count_parameters
    from mythos.planning.layout import choose_layout
    from mythos.planning.rank_state import rank_state
    from mythos.planning.search import Search
    from mythos.planning.speed import time_per_token

    gpu = named_gpu(options.gpu)
    check_numbers(options)
    config = read_config(options.config, options.overrides, options.gpus, options.tokens)
    check_fit(config, options.gpus)
    search = Search(config, options.gpus, options.machine_gpus, fixed_fields(options.overrides))
    found = search.fastest(gpu)
    if found and options.config in PRESETS:
        config = found.candidate.config
    model, length, tokens = config.model, config.data.sequence_length, config.train_steps * config.tokens_per_step
    depths = sorted({1, round(config.depth_mean), config.depth_maximum})
    flops = flops_per_token(config, depths)
    needed = flops["training_needed"]
    executed = flops["training_executed"][config.parallel.activation_checkpointing]

    layout = choose_layout(config, options.gpus, min(options.machine_gpus, options.gpus), gpu.memory)
    state = rank_state(config, layout)
    price = gpu.price if options.price is None else options.price
    seconds_per_token: dict[str, float] | None = None
    utilisation = options.mfu
    if utilisation is None:
        time = time_per_token(config, state, gpu, options.machine_gpus)
        seconds_per_token, utilisation = asdict(time), executed / (gpu.peak * time.total)
    compiled = compiles(config, torch.device("cuda"))
    parts = "compiled" if layout.expert == 1 else "compiled but for the core"
    tokens_per_second = options.gpus * gpu.peak * utilisation / executed
    seconds = tokens / tokens_per_second
    return {
        "config": options.config,
        "parameters": asdict(count_parameters(model)),
        "sequence_length": length,
        "flops_per_token": flops,
        "layout": layout.sizes | {"why": layout.why},
        "checkpointing": config.parallel.activation_checkpointing,
        "micro_batch": config.train.micro_batch,
        "memory": memory_per_gpu(config, layout, state, gpu.memory),
        "cache_bytes_per_token": {depth: cache_bytes_per_token(model, depth, torch.bfloat16) for depth in depths},
        "run": {
            "gpu": options.gpu.upper(),
            "gpus": options.gpus,
            "peak_flops": gpu.peak,
            "utilisation": utilisation,
            "model_utilisation": utilisation * needed / executed,
            "compiled": compiled,
            "compiled_parts": parts if compiled else "eager",
            "seconds_per_token": seconds_per_token,
            "dollars_per_hour": price,
            "tokens": tokens,
            "flops": tokens * needed,
            "tokens_per_second": tokens_per_second,
            "seconds": seconds,
            "dollars": options.gpus * price * seconds / 3600,
        },
        "fastest": fastest_layout(search, found, gpu),
        "longest_context": longest_contexts(search, gpu),
        "split": asdict(optimal_split(model, length, options.flops or tokens * needed)),
    }


def fixed_fields(overrides: Sequence[str]) -> frozenset[str]:
    """Fields that the search for a layout leaves as they are, because the command line sets them."""
    from mythos.planning.search import SEARCHED

    names = {override.partition("=")[0] for override in overrides}
    chosen = {name for name in SEARCHED if f"parallel.{name}" in names}
    return frozenset(chosen | ({"micro_batch"} & {name.removeprefix("train.") for name in names}))


def fastest_layout(search: Search, found: Found | None, gpu: Gpu) -> dict[str, Any]:
    """The fastest layout that fits; if none does, the one that needs least memory, and how many GPUs would do."""
    if found:
        candidate = found.candidate
        return {
            "fits": True,
            "overrides": candidate.overrides,
            "needed": found.needed,
            "tried": found.tried,
            "tokens_per_second": search.gpus / search.model(gpu).time(candidate.config, candidate.state).total,
        }
    nearest, more = search.least(), search.fewest_gpus(gpu.memory)
    return {
        "fits": False,
        "nearest": least_figures(nearest),
        "fewest_gpus": least_figures(more),
        "most_gpus_tried": search.most_gpus,
    }


def least_figures(least: Least | None) -> dict[str, Any] | None:
    """A layout that needs least memory, as JSON values."""
    if least is None:
        return None
    return {
        "gpus": least.candidate.layout.size,
        "overrides": least.candidate.overrides,
        "needed": least.needed,
        "activations": least.activations,
    }


def longest_contexts(search: Search, gpu: Gpu) -> dict[str, Any] | None:
    """Longest sequences to train on and their layouts, by GiB of a GPU; None if no layout is possible."""
    sizes = sorted({80, 141, gpu.memory // GIB})
    longest = dict(zip(sizes, search.longest_contexts([size * GIB for size in sizes]), strict=False))
    if not longest:
        return None
    return {
        "context": search.config.model.context_length,
        "tokens": {size: each.tokens for size, each in longest.items()},
        "overrides": {size: each.overrides for size, each in longest.items()},
    }


def check_numbers(options: argparse.Namespace) -> None:
    """Raise MythosError for numbers that are not finite and above 0; only the price may be 0."""
    for name in ("gpus", "machine_gpus", "tokens", "mfu", "price", "flops"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf") and (name != "price" or value != 0):
            raise MythosError(f"--{name.replace('_', '-')}: got {value}; give a number above 0")
    if options.mfu is not None and options.mfu > 1:
        raise MythosError(f"--mfu: got {options.mfu}; it is a share of the peak, at most 1, e.g. 0.4")


def flops_per_token(config: Config, depths: Sequence[int]) -> dict[str, Any]:
    """Compute FLOPs per token, forward by depth and of training by checkpointing mode."""
    from mythos.planning.budget import mean_depths
    from mythos.planning.fake_step import CHECKPOINTING
    from mythos.planning.flops import forward_flops
    from mythos.planning.speed import executed_flops

    flops, means = forward_flops(config.model, config.data.sequence_length), mean_depths(config)
    # What grows with the square of the sequence length is missing in a sequence of one token.
    short, whole = (cost.forward(config.depth_mean) for cost in (forward_flops(config.model, 1), flops))
    return {
        "forward": {depth: flops.forward(depth) for depth in depths},
        "attention_scores_share": 1 - short / whole,
        "mean_loops": means.loops,
        "mean_backprop": means.backprop,
        "training_needed": flops.training_at(means.loops, means.backprop),
        "training_executed": {
            mode: executed_flops(config, means, mode, config.parallel.shared > 1) for mode in CHECKPOINTING
        },
    }


def memory_per_gpu(config: Config, layout: Layout, state: RankState, capacity: int) -> dict[str, Any]:
    """Compute the bytes on each GPU: state, gathered parameters, and activations by checkpointing mode."""
    from mythos.planning.fake_step import CHECKPOINTING
    from mythos.planning.rank_state import activations, working_memory

    working = working_memory(config, state).total
    by_mode = {}
    for mode in CHECKPOINTING:
        passes = activations(config, layout, mode)
        total = state.total + working + passes.peak
        by_mode[mode] = {**asdict(passes), "total": total, "fits": total <= capacity}
    return {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "gathering": working,
        "device": capacity,
        "activations": by_mode,
    }


def read_config(name: str, overrides: Sequence[str], gpus: int, tokens: float | None) -> Config:
    """Load a configuration or build one for a preset, with a definite vocabulary and length of the run."""
    from mythos.planning.budget import sized
    from mythos.planning.flops import count_parameters

    paths = {override.partition("=")[0] for override in overrides}
    if tokens is not None and (lengths := paths & {"train.steps", "train.tokens"}):
        raise MythosError(f"--tokens and {min(lengths)}: both set the length of the run; give one of them")
    if name in PRESETS:
        if tokens is None and not paths & {"train.steps", "train.tokens"}:
            tokens = float(TOKENS_PER_PARAMETER * count_parameters(preset_config(name)).active)
        config = preset_run(name, overrides, gpus, by_tokens=tokens is not None)
    elif not Path(name).exists() and not name.endswith((".yaml", ".yml")) and name not in packaged_configs():
        raise MythosError(
            f"{name} is neither a file nor a preset nor a configuration that comes with mythos; presets: "
            f"{', '.join(PRESETS)}; configurations: {', '.join(packaged_configs())}"
        )
    else:
        config = load_config(name, overrides)
    config = sized(config)
    return config if tokens is None else config.with_fields("train", tokens=max(1, round(tokens)), steps=None)


def preset_run(name: str, overrides: Sequence[str], gpus: int, by_tokens: bool) -> Config:
    """Build the configuration of a run of a preset; `by_tokens` if tokens, not steps, will set its length."""
    batch = gpus * -(-PRESET_BATCH // gpus)
    data: dict[str, Any] = {
        "model": {"preset": name},
        "data": {"streams": batch, "sequence_length": min(preset_config(name).context_length, LONGEST)},
        "train": {"global_batch": batch, "micro_batch": 1, "steps": 1},
    }
    data = overridden(data, overrides, name)
    paths = {override.partition("=")[0] for override in overrides}
    if by_tokens or ("train.tokens" in paths and "train.steps" not in paths):
        data["train"].pop("steps", None)
        data["train"].setdefault("tokens", 1)
    return config_from_dict(data)


def duration(seconds: float) -> str:
    """Write a time in days, or in hours below two days."""
    return f"{seconds / 86400:,.2f} days" if seconds >= 172_800 else f"{seconds / 3600:,.2f} hours"


def utilisation_source(run: dict[str, Any]) -> str:
    """Say where the assumed utilisation comes from."""
    time = run["seconds_per_token"]
    if time is None:
        return "by --mfu"
    total = sum(time.values())
    parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in time.items() if seconds)
    return f"from a model of a step's traffic, {run['compiled_parts']}, not measured ({parts}; --mfu)"


def page(figures: dict[str, Any]) -> str:
    """Write the figures as text for a terminal."""
    flops, memory, run, split = (figures[name] for name in ("flops_per_token", "memory", "run", "split"))
    layout, parameters = figures["layout"], figures["parameters"]
    state = {name: memory[name] for name in ("parameters", "gradients", "optimizer", "gathering") if memory[name]}
    executed = flops["training_executed"]
    configured = memory["activations"][figures["checkpointing"]]
    room = "" if configured["fits"] else f", if each had {configured['total'] / GIB:,.1f} GiB of memory"
    lines = [
        figures["config"],
        "",
        f"parameters      {parameters['total']:,} ({parameters['active']:,} active per token and loop)",
        f"FLOPs per token at {figures['sequence_length']:,} tokens, {flops['attention_scores_share']:.1%} for scores",
        *(f"  forward, {depth:>4} loops   {value:.3e}" for depth, value in flops["forward"].items()),
        f"  training             {flops['training_needed']:.3e} at {flops['mean_loops']:.2f} loops, "
        f"{flops['mean_backprop']:.2f} with gradient (means of the run)",
        *(
            f"    {mode:<12} {value:.3e} executed, {value / flops['training_needed']:.3f} x needed"
            for mode, value in executed.items()
        ),
        "",
        f"memory of a GPU, GiB, of {memory['device'] / GIB:g}: {layout['mode']} ({layout['why']}), "
        f"micro-batches of {figures['micro_batch']}",
        *(f"  {name:<20}{size / GIB:>12,.3f}" for name, size in state.items()),
        *(
            f"  activations, {mode:<10}{passes['peak'] / GIB:>9,.3f}   in all {passes['total'] / GIB:,.3f}"
            f"{'' if passes['fits'] else ', does not fit'}{' (configured)' * (mode == figures['checkpointing'])}"
            for mode, passes in memory["activations"].items()
        ),
        "decode cache, bytes per token in bfloat16: "
        + ", ".join(
            f"{size:,} at {depth} loop{'s' * (depth > 1)}" for depth, size in figures["cache_bytes_per_token"].items()
        ),
        "",
        f"{run['tokens']:,} tokens ({run['flops']:.3e} FLOPs) on {run['gpus']:,} {run['gpu']}{room}",
        f"  {run['tokens_per_second']:,.0f} tokens/s, {duration(run['seconds'])}, "
        f"{run['gpus'] * run['seconds'] / 3600:,.1f} GPU hours, ${run['dollars']:,.2f}",
        f"  assumed: {run['utilisation']:.0%} of {run['peak_flops'] / 1e12:,.0f} TFLOP/s, dense bfloat16, for all "
        f"FLOPs executed ({run['model_utilisation']:.0%} for those needed), {utilisation_source(run)}; "
        f"${run['dollars_per_hour']:g} an hour (--price)",
        "",
        *layout_lines(figures),
        "",
        f"the best split of a budget of {split['flops']:.2e} FLOPs: {split['loops']:.1f} mean loops and "
        f"{split['tokens']:.2e} tokens",
        "  after arXiv 2604.12946 (mu* ~ C^0.40, D* ~ C^0.78, fitted to dense models of 140M and 370M)",
    ]
    return "\n".join(lines)


def layout_lines(figures: dict[str, Any]) -> list[str]:
    """The fastest layout, or what is missing; and the longest sequences."""
    run, fastest, longest = figures["run"], figures["fastest"], figures["longest_context"]
    gpus = f"{run['gpus']:,} {run['gpu']}"
    if fastest["fits"]:
        lines = [
            f"fastest of {fastest['tried']:,} layouts on {gpus}, by the same model: "
            f"{fastest['needed'] / GIB:,.1f} GiB, {fastest['tokens_per_second']:,.0f} tokens/s",
            f"  {' '.join(fastest['overrides'])}",
        ]
    elif fastest["nearest"] is None:
        lines = [f"no layout is possible on {gpus} with the given fields of parallel"]
    else:
        nearest, more = fastest["nearest"], fastest["fewest_gpus"]
        lines = [f"no layout fits on {gpus}. The one that needs least memory:", f"  {least_line(nearest)}"]
        if more:
            lines += [f"{more['gpus']:,} GPUs are enough:", f"  {least_line(more)}"]
        else:
            lines.append(f"nor does any on up to {fastest['most_gpus_tried']:,} GPUs")
    if longest:
        lengths = ", ".join(f"{tokens:,} on {size} GiB" for size, tokens in longest["tokens"].items())
        lines += [
            f"longest sequences to train on, in tokens, of a context of {longest['context']:,}: {lengths}",
            *dict.fromkeys(f"  {' '.join(overrides)}" for overrides in longest["overrides"].values()),
        ]
    return lines


def least_line(least: dict[str, Any]) -> str:
    """The memory of a layout, and how to configure it."""
    return (
        f"{least['needed'] / GIB:,.1f} GiB, {least['activations'] / GIB:,.1f} of them activations: "
        f"{' '.join(least['overrides'])}"
    )
