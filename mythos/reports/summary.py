"""Texts that a run prints at its start, after a validation or a checkpoint, and at its end."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

from mythos.config.presets import model_name
from mythos.config.sections import Config
from mythos.errors import without_credentials
from mythos.evaluation.depth_sweep import fit_losses
from mythos.generation.depth_view import harmless
from mythos.planning.flops import count_parameters
from mythos.training.metrics import losses_by_depth

SAMPLE_CHARACTERS = 160
"""Most characters of a sample in a line: two lines of a terminal."""


def config_lines(config: Config, micro_batch: int, validation_sequences: int) -> dict[str, str]:
    """Summarise a configuration in one line each for model, depth, data and training."""
    parameters = count_parameters(config.model)
    return {
        "model": f"{model_name(config.model)}: {parameters.total:,} parameters, {parameters.active:,} active per loop",
        "depth": config.depth_summary,
        "data": f"{config.data.kind}, {config.data.streams} streams, {validation_sequences} validation sequences",
        "training": f"{config.train_steps:,} steps of {config.train.global_batch} x {config.data.sequence_length} = "
        f"{config.tokens_per_step:,} tokens, {config.train_steps * config.tokens_per_step:,} in all; "
        f"micro-batches of {micro_batch}",
    }


def summary(config: Config, metrics: dict[str, Any], mean_loops: int, tokens: int) -> str:
    """The table of a validation by depth after `tokens` tokens of training, its fit, and where positions halt.

    `metrics` are the validation's, `mean_loops` is the depth at which `val/loss` was measured.
    """
    curve = losses_by_depth(metrics)
    is_task = "val/accuracy" in metrics
    column = "accuracy" if is_task else "perplexity"
    lines = [f"\nValidation after {tokens:,} tokens\n\n  loops      loss  {column:>10}"]
    for loops, loss in curve.items():
        mark = "  <- training mean" if loops == mean_loops else ""
        score = f"{metrics[f'val/accuracy@{loops}']:10.2%}" if is_task else f"{math.exp(loss):10.2f}"
        lines.append(f"  {loops:5d}  {loss:8.4f}  {score}{mark}")
    if is_task:
        at = "as many loops as steps" if config.depth.follow == "difficulty" else f"{mean_loops} loops"
        lines.append(f"\n  {metrics['val/accuracy']:.2%} of the sequences have every answer right at {at}")
    else:
        lines.append(f"\n  {metrics['val/bits_per_byte']:.3f} bits per byte at {mean_loops} loops")
    if "val/fit_limit" in metrics:
        lines.append(f"  {fit_losses(curve)}")
    if "val/auto_loss" in metrics:
        perplexity = "" if is_task else f", perplexity {math.exp(metrics['val/auto_loss']):.2f}"
        halted = f"{metrics['val/auto_loops']:.2f} loops where {config.model.halting} halts"
        lines.append(f"  {halted}: {metrics['val/auto_saved']:.0%} saved{perplexity}")
    return "\n".join(lines)


def validation_line(config: Config, metrics: dict[str, Any], mean_loops: int) -> str:
    """Summarise a validation in one line: loss at each depth and loops with halting. Arguments as for `summary`."""
    losses = ", ".join(f"{loss:.3f} at {loops}" for loops, loss in losses_by_depth(metrics).items())
    parts = [f"step {metrics['step']}/{config.train_steps}", f"validation loss {losses} loops"]
    if "val/accuracy" in metrics:
        parts.append(f"all answers right in {metrics['val/accuracy']:.1%}")
    else:
        parts.append(f"{metrics['val/bits_per_byte']:.3f} bits per byte at {mean_loops}")
    if "val/auto_loss" in metrics:
        parts.append(f"{config.model.halting}: {metrics['val/auto_loss']:.3f} at {metrics['val/auto_loops']:.1f} loops")
    return " | ".join(parts)


def sample_line(config: Config, step: int, sample: str) -> str:
    """The beginning of a sample in one line, with every run of white space as one space."""
    text = harmless(" ".join(sample.split()))
    if len(text) > SAMPLE_CHARACTERS:
        text = f"{text[:SAMPLE_CHARACTERS]} ..."
    return f"step {step}/{config.train_steps} | sample: {text}"


def checkpoint_line(config: Config, step: int, path: Path | str) -> str:
    """Say in one line that a checkpoint is complete."""
    return f"step {step}/{config.train_steps} | checkpoint {without_credentials(str(path))}"


def ending(samples: Sequence[str], plots: Sequence[Path], metrics: Path, checkpoint: Path | str | None) -> str:
    """The first of the last samples, and the paths of everything that a run has written."""
    sample = f"\nSample\n\n{indent(harmless(samples[0]), '  ')}\n" if samples else ""
    drawn = "\n            ".join(map(str, plots))
    newest = without_credentials(str(checkpoint))
    return f"{sample}\nplots       {drawn}\nmetrics     {metrics}\ncheckpoint  {newest}"
