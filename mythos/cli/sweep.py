"""Measure the loss after every loop of a trained model, and the loops that halting saves.

Writes step-XXXXXXXX.png, .csv and .json to sweep/ in the run directory, step-XXXXXXXX-2 and so on for further sweeps of
that step, and prints the tables. docs/depth.md explains them.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from mythos.cli.common import (
    add_measuring_options,
    check_least,
    check_model_path,
    comma_separated,
    command_parser,
    measuring_folder,
    positive_numbers,
    whole_numbers,
)
from mythos.errors import MythosError
from mythos.files.local import unused_stem, writing

if TYPE_CHECKING:
    from mythos.checkpoints.stored_model import OpenedModel
    from mythos.evaluation.depth_sweep import DepthSweep, HaltingPoint


def parser() -> argparse.ArgumentParser:
    parser = command_parser("sweep", __doc__)
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="run directory, checkpoint step-*, or exported model")
    parser.add_argument(
        "--loops",
        type=partial(whole_numbers, "--loops"),
        metavar="N,N,...",
        help="loop counts to measure (1, 2, 4, ... and the training mean, up to 8 times the mean)",
    )
    parser.add_argument("--sequences", type=int, metavar="N", help="validation sequences (as many as in training)")
    parser.add_argument(
        "--rules", type=comma_separated, metavar="RULE,...", help="halting rules (all that the model supports)"
    )
    parser.add_argument(
        "--thresholds",
        type=partial(positive_numbers, "--thresholds"),
        metavar="X,X,...",
        help="exit thresholds, for a single rule",
    )
    parser.add_argument("--most", type=int, metavar="N", help="maximum loops under a halting rule (the training mean)")
    parser.add_argument("--data", metavar="GLOB", help="text files to measure on (the run's validation set)")
    add_measuring_options(parser, "sweep")
    return parser


def run(options: argparse.Namespace) -> None:
    """Open, measure, write and print. Raises MythosError if one of these is impossible."""
    check_least(options, sequences=1, most=1, micro_batch=1)
    if options.thresholds and (options.rules is None or len(options.rules) != 1):
        raise MythosError("--thresholds: name the one rule they are for, e.g. --rules convergence --thresholds 0.2,0.1")
    check_model_path(options.path)
    from mythos.checkpoints.stored_model import open_model
    from mythos.distributed.ranks import choose_device
    from mythos.evaluation.depth_sweep import depth_sweep, sweep_depths
    from mythos.evaluation.text import as_in_training, validation_data
    from mythos.model.layers import autocast_to
    from mythos.reports.sweep_plots import draw_sweep

    device = choose_device(options.device, option="--device")
    opened = open_model(options.path, device)
    if opened.run and opened.run.depth.follow == "difficulty":
        raise MythosError(
            f"{options.path}: got a run on depth.follow difficulty, which has no single training depth to compare "
            "with; `mythos reasoning` measures it, by difficulty and loops"
        )
    fixed = opened.model.config.injection == "none"
    mean = 1 if fixed else opened.mean_loops
    loops = sorted(set(options.loops or ([1] if fixed else sweep_depths(mean))))
    for option, most in (("--loops", loops[-1]), ("--most", options.most or 1)):
        if fixed and most > 1:
            raise MythosError(f"{option}: got {most}; a fixed-depth model (model.injection: none) runs its core once")
    rules = chosen_rules(opened, options.rules, options.thresholds)
    out = measuring_folder(options, "sweep")
    data = validation_data(opened, options.data, options.sequences)
    dtype, micro_batch = as_in_training(opened, device, options.dtype, options.micro_batch)
    sweep = depth_sweep(
        opened.model,
        data,
        depths=loops,
        mean_loops=mean,
        rules=rules,
        most=options.most,
        micro_batch=micro_batch,
        autocast=autocast_to(dtype, device),
    )
    about: dict[str, Any] = {"source": opened.source, "step": opened.step}
    about |= {"data": options.data or "the run's validation set", "dtype": str(dtype).removeprefix("torch.")}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with unused_stem(out / f"step-{opened.step:08d}", "json", "csv", "png") as stem:
            paths = [*sweep.save(stem, about), draw_sweep(sweep, out / f"{stem.name}.png")]
    print(report(sweep))
    print("\nwritten  " + "\n         ".join(map(str, paths)))


def chosen_rules(
    opened: OpenedModel, names: list[str] | None, thresholds: list[float] | None
) -> list[tuple[str, float]]:
    """Return the halting rules with their thresholds. Raises MythosError if the model does not support them."""
    from mythos.evaluation.depth_sweep import sweep_rules
    from mythos.model.halting import halting_rule

    try:
        rules = sweep_rules(opened.model, names)
    except ValueError as error:
        raise MythosError(f"--rules: {error}") from error
    if names is None or thresholds is None:
        return rules
    try:
        for threshold in thresholds:
            halting_rule(opened.model, names[0], threshold)
    except ValueError as error:
        raise MythosError(f"--thresholds: {error}") from error
    return [(names[0], threshold) for threshold in thresholds]


def report(sweep: DepthSweep) -> str:
    """Write the sweep as tables for a terminal."""
    lines = [f"\n{sweep.sequences} sequences of {sweep.sequence_length} tokens", ""]
    lines += ["  loops      loss  perplexity  bits/byte  log |h|   change"]
    for depth in sweep.read_out:
        mark = "  <- training mean" if depth.loops == sweep.mean_loops else ""
        lines.append(
            f"  {depth.loops:5d}  {depth.loss:8.4f}  {depth.perplexity:10.2f}  {cell(depth.bits_per_byte, '9.4f')}  "
            f"{depth.state_norm:7.3f}  {depth.state_delta:7.1e}{mark}"
        )
    lines += ["", f"  {fit_line(sweep)}"]
    if sweep.halting:
        loss_at_mean = next((depth.loss for depth in sweep.read_out if depth.loops == sweep.mean_loops), None)
        lines += ["", f"  rule               threshold  loops  saved  perplexity  to {sweep.mean_loops} loops"]
        lines += [halting_line(point, loss_at_mean) for point in sweep.halting]
    return "\n".join(lines)


def halting_line(point: HaltingPoint, loss_at_mean: float | None) -> str:
    """Write a line of the table of halting rules, with the change of perplexity from the training mean."""
    change = "" if loss_at_mean is None else f"{math.expm1(point.loss - loss_at_mean):+.2%}"
    return (
        f"  {point.rule:17}  {point.threshold:9.4g}  {point.loops:5.2f}  {point.saved:5.0%}  {point.perplexity:10.2f}  "
        f"{change:>10}{'  <- default' if point.default else ''}"
    )


def fit_line(sweep: DepthSweep) -> str:
    """Describe the fit of the loss by loops."""
    fit = sweep.fit
    if fit is None:
        return "no fit of L(T): it takes four depths with finite losses up to the least one"
    rising = sweep.read_out[-1].loops > fit.loops[-1]
    return f"{fit}" + (f"; fitted up to {fit.loops[-1]} loops, after which the loss rises" if rising else "")


def cell(value: float | None, form: str) -> str:
    """Format a number, or an empty cell of the same width for None."""
    return " " * int(form.partition(".")[0]) if value is None else f"{value:{form}}"
