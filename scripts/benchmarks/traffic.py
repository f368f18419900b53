"""Kernels and memory traffic of a training step on a GPU beside its matmuls, counted over fake tensors."""

import argparse
from dataclasses import asdict
from typing import Any

from mythos.cli.common import check_least
from mythos.planning.traffic import Traffic, compiled_pass_traffic, step_traffic
from mythos.progress import aligned
from scripts.benchmarks.steps import configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("config", metavar="CONFIG.yaml | SIZE", help="a run, a preset, or a size of this benchmark")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a micro-batch (8)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (2048)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print the table; return the figures. Nothing is timed, so the counts are the same on every machine."""
    check_least(options, rows=1, length=1)
    config = configuration(options.config, options.overrides)
    checkpointing = config.parallel.activation_checkpointing
    counted = step_traffic(config.model, options.length, options.rows, checkpointing)
    compiled = compiled_pass_traffic(config.model, options.length, options.rows)
    print(
        f"{options.config}, bfloat16, {options.rows} x {options.length:,} tokens, activation_checkpointing="
        f"{checkpointing} (compiled: none)"
    )
    rows = [
        ["part", "pass", "products", "other kernels", "KB per token"],
        *_rows("embedding, prelude, coda, head, casts", counted.once),
        *_rows("a loop of the core", counted.loop),
        *_rows("a loop of the core, compiled", compiled),
    ]
    print(aligned(rows, left=2))
    return {
        "configuration": config.model_dump(mode="json"),
        "rows": options.rows,
        "length": options.length,
        **asdict(counted),
        "compiled_loop": asdict(compiled),
    }


def _rows(name: str, traffic: Traffic) -> list[list[str]]:
    passes = {
        "forward": (traffic.products_forward, traffic.kernels_forward, traffic.bytes_forward),
        "backward": (traffic.products_backward, traffic.kernels_backward, traffic.bytes_backward),
    }
    return [
        [name, which, f"{products:,.0f}", f"{kernels:,.0f}", f"{size / 1000:,.0f}"]
        for which, (products, kernels, size) in passes.items()
    ]
