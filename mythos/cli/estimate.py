"""Say what a model costs before it is trained: size, FLOPs, memory, time, money.

A preset is planned with a vocabulary of 4,096 where it has none, sequences of its context (at most 8,192 tokens),
micro-batches of one sequence, and 20 tokens for each active parameter; override them like fields of a configuration.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos.cli.common import CommandParser, exit_status
from mythos.config.checking import Problems, apply_override
from mythos.config.loading import config_from_dict, load_config, packaged_configs
from mythos.config.presets import BPE_VOCAB_SIZE, PRESETS, preset_config
from mythos.config.sections import Config
from mythos.errors import MythosError

GIB = 2**30
TOKENS_PER_PARAMETER = 20
"""Of a run whose length nobody gave (arXiv 2203.15556)."""
LONGEST = 8192
"""Tokens of a preset's sequences, unless its context is shorter or another length is given."""


def parser(prog: str = "mythos estimate") -> argparse.ArgumentParser:
    """The command line, to be parsed intermixed: options may stand between the overrides."""
    made = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("config", metavar="CONFIG_or_PRESET", help="configuration of a run, or the name of a preset")
    made.add_argument("overrides", nargs="*", metavar="key.path=value", help="fields to override")
    made.add_argument("--gpu", default="H100", help="A100, H100, H200 or B200 (default H100)")
    made.add_argument("--gpus", type=int, default=8, metavar="N", help="how many (default 8)")
    made.add_argument("--machine-gpus", type=int, default=8, metavar="N", help="how many on a machine (default 8)")
    made.add_argument("--tokens", type=float, metavar="N", help="training tokens (default: the run's)")
    made.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="share of the peak (default: from a model of the traffic)",
    )
    made.add_argument("--price", type=float, metavar="USD", help="of a GPU for an hour (default: a market figure)")
    made.add_argument("--flops", type=float, metavar="C", help="budget to split (default: that of the run)")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    return made


def main(arguments: list[str], prog: str = "mythos estimate") -> int:
    """Run the command line; returns the exit status."""
    options = parser(prog).parse_intermixed_args(arguments)
    return exit_status(lambda: report(options))


def report(options: argparse.Namespace) -> None:
    """Print the page, and write the JSON. Raises MythosError like :func:`estimate`, and where it cannot be written."""
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
    """All figures, as JSON takes them: bytes, seconds, US dollars and FLOPs.

    Raises MythosError for a GPU or preset that is not known, numbers out of range, or what a configuration refuses.
    """
    import torch

    from mythos.distributed.parallel import compiles
    from mythos.distributed.ranks import check_fit
    from mythos.model.cache import cache_bytes_per_token
    from mythos.planning.budget import mean_depths, named_gpu, optimal_split, training_run
    from mythos.planning.fake_step import CHECKPOINTING, recomputed_flops
    from mythos.planning.flops import count_parameters, forward_flops
    from mythos.planning.layout import choose_layout
    from mythos.planning.rank_state import activations, rank_state, working_memory
    from mythos.planning.traffic import OPTIMIZER_BYTES, step_time, step_traffic

    gpu = named_gpu(options.gpu)
    for name in ("gpus", "machine_gpus", "tokens", "mfu", "price", "flops"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf") and (name != "price" or value != 0):
            raise MythosError(f"--{name.replace('_', '-')}: got {value}; give a number above 0")
    if options.mfu is not None and options.mfu > 1:
        raise MythosError(f"--mfu: got {options.mfu}; it is a share of the peak, at most 1, e.g. 0.4")
    config = read(options.config, options.overrides, options.gpus, options.tokens)
    check_fit(config, options.gpus)
    model, length, dtype = config.model, config.data.sequence_length, torch.bfloat16
    parameters, flops, depths = count_parameters(model), forward_flops(model, length), mean_depths(config)
    needed = flops.training_at(depths.loops, depths.backprop)
    again = {mode: depths.backprop * recomputed_flops(model, length, mode) for mode in CHECKPOINTING}
    executed = needed + again[config.parallel.activation_checkpointing]
    tokens = config.train_steps * config.tokens_per_step

    local = min(options.machine_gpus, options.gpus)
    layout = choose_layout(config, options.gpus, local, gpu.memory)
    state = rank_state(config, layout)
    working = working_memory(config, state).total
    memory = {}
    for mode in CHECKPOINTING:
        passing = activations(config, layout, mode)
        total = state.total + working + passing.peak
        memory[mode] = {**asdict(passing), "total": total, "fits": total <= gpu.memory}
    price = gpu.price if options.price is None else options.price
    time, utilisation = None, options.mfu
    if utilisation is None:
        rows = max(1, config.train.global_batch // options.gpus)
        rows = rows if config.train.micro_batch == "auto" else min(rows, config.train.micro_batch)
        time = step_time(
            step_traffic(model, length, rows, config.parallel.activation_checkpointing),
            executed=executed,
            loops=depths.loops,
            backprop=depths.backprop,
            tokens=rows * length,
            optimizer=OPTIMIZER_BYTES * state.parameters / 4 * options.gpus / config.tokens_per_step,
            peak=gpu.peak,
            bandwidth=gpu.bandwidth,
            compiled=compiles(config, torch.device("cuda")),
        )
        utilisation = executed / (gpu.peak * time.total)
    run = training_run(tokens, executed, gpu.peak, options.gpus, utilisation, price)
    loops = sorted({1, round(config.depth_mean), config.depth_maximum})
    return {
        "config": options.config,
        "parameters": asdict(parameters),
        "sequence_length": length,
        "flops_per_token": {
            "forward": {depth: flops.once + depth * flops.loop for depth in loops},
            "attention_scores_share": attention_share(config),
            "mean_loops": depths.loops,
            "mean_backprop": depths.backprop,
            "training_needed": needed,
            "training_executed": {mode: needed + more for mode, more in again.items()},
        },
        "layout": {"mode": layout.mode, "replicate": layout.replicate, "shard": layout.shard, "why": layout.why},
        "checkpointing": config.parallel.activation_checkpointing,
        "micro_batch": config.train.micro_batch,
        "memory": {
            "parameters": state.parameters,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
            "gathering": working,
            "device": gpu.memory,
            "activations": memory,
        },
        "cache_bytes_per_token": {depth: cache_bytes_per_token(model, depth, dtype) for depth in loops},
        "run": {
            "gpu": options.gpu.upper(),
            "gpus": options.gpus,
            "peak_flops": gpu.peak,
            "utilisation": utilisation,
            "model_utilisation": utilisation * needed / executed,
            "compiled": compiles(config, torch.device("cuda")),
            "seconds_per_token": None if time is None else asdict(time),
            "dollars_per_hour": price,
            "tokens": tokens,
            "flops": tokens * needed,
            **asdict(run),
        },
        "split": asdict(optimal_split(model, length, options.flops or tokens * needed)),
    }


def attention_share(config: Config) -> float:
    """Part of a forward pass at the mean depth that grows with the square of the sequence."""
    from mythos.planning.flops import forward_flops

    flops, short = forward_flops(config.model, config.data.sequence_length), forward_flops(config.model, 1)
    long_pass, short_pass = (cost.once + config.depth_mean * cost.loop for cost in (flops, short))
    return 1 - short_pass / long_pass


def read(name: str, overrides: Sequence[str], gpus: int, tokens: float | None) -> Config:
    """The configuration of a file or a preset, with the vocabulary and the length of the run settled."""
    given = {override.partition("=")[0] for override in overrides}
    if tokens is not None and (twice := given & {"train.steps", "train.tokens"}):
        raise MythosError(f"--tokens and {min(twice)}: both say how long the run is; give one of them")
    if name in PRESETS:
        model = preset_config(name)
        batch = gpus * -(-64 // gpus)
        data: dict[str, Any] = {
            "model": {"preset": name},
            "data": {"streams": batch, "sequence_length": min(model.context_length, LONGEST)},
            "train": {"global_batch": batch, "micro_batch": 1, "steps": 1},
        }
        problems = Problems(name, Config)
        for override in overrides:
            data = apply_override(data, override, problems)
        problems.raise_any()
        if tokens is None and not given & {"train.steps", "train.tokens"}:
            from mythos.planning.flops import count_parameters

            tokens = float(TOKENS_PER_PARAMETER * count_parameters(model).active)
        if tokens is not None or ("train.tokens" in given and "train.steps" not in given):
            data["train"].pop("steps", None)
            data["train"].setdefault("tokens", 1)
        config = config_from_dict(data)
    elif not Path(name).exists() and not name.endswith((".yaml", ".yml")) and name not in packaged_configs():
        raise MythosError(
            f"{name} is neither a file nor a preset nor a configuration that comes with mythos; presets: "
            f"{', '.join(PRESETS)}; configurations: {', '.join(packaged_configs())}"
        )
    else:
        config = load_config(name, overrides)
    if config.model.vocab_size == "auto":
        size = config.tokenizer.vocab_size if config.tokenizer.name == "bpe" else BPE_VOCAB_SIZE
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    if tokens is not None:
        train = config.train.model_copy(update={"tokens": max(1, round(tokens)), "steps": None})
        config = config.model_copy(update={"train": train})
    return config


def duration(seconds: float) -> str:
    """In days, or in hours where these are few."""
    return f"{seconds / 86400:,.2f} days" if seconds >= 172_800 else f"{seconds / 3600:,.2f} hours"


def utilisation_source(run: dict[str, Any]) -> str:
    """Where the assumed utilisation is from."""
    time = run["seconds_per_token"]
    if time is None:
        return "by --mfu"
    total = sum(time.values())
    parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in time.items() if seconds)
    return (
        f"from a model of a step's traffic, {'compiled' if run['compiled'] else 'eager'}, not measured ({parts}; --mfu)"
    )


def page(figures: dict[str, Any]) -> str:
    """The figures for people."""
    flops, memory, run, split = (figures[name] for name in ("flops_per_token", "memory", "run", "split"))
    layout, parameters = figures["layout"], figures["parameters"]
    state = {name: memory[name] for name in ("parameters", "gradients", "optimizer", "gathering") if memory[name]}
    executed = flops["training_executed"]
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
            f"  activations, {mode:<10}{passing['peak'] / GIB:>9,.3f}   in all {passing['total'] / GIB:,.3f}"
            f"{'' if passing['fits'] else ', does not fit'}{' (configured)' * (mode == figures['checkpointing'])}"
            for mode, passing in memory["activations"].items()
        ),
        "decode cache, bytes per token in bfloat16: "
        + ", ".join(
            f"{size:,} at {depth} loop{'s' * (depth > 1)}" for depth, size in figures["cache_bytes_per_token"].items()
        ),
        "",
        f"{run['tokens']:,} tokens ({run['flops']:.3e} FLOPs) on {run['gpus']:,} {run['gpu']}",
        f"  {run['tokens_per_second']:,.0f} tokens/s, {duration(run['seconds'])}, "
        f"{run['gpus'] * run['seconds'] / 3600:,.1f} GPU hours, ${run['dollars']:,.2f}",
        f"  assumed: {run['utilisation']:.0%} of {run['peak_flops'] / 1e12:,.0f} TFLOP/s, dense bfloat16, for all "
        f"FLOPs executed ({run['model_utilisation']:.0%} for those needed), {utilisation_source(run)}; "
        f"${run['dollars_per_hour']:g} an hour (--price)",
        "",
        f"a budget of {split['flops']:.2e} FLOPs is spent best at {split['loops']:.1f} mean loops and "
        f"{split['tokens']:.2e} tokens",
        "  after arXiv 2604.12946 (mu* ~ C^0.40, D* ~ C^0.78, fitted to dense models of 140M and 370M)",
    ]
    return "\n".join(lines)
