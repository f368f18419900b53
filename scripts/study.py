#!/usr/bin/env python3
"""Collect the depth sweeps of runs into one file, and print that file as a table: one line for each architecture.

    python scripts/study.py collect results.json runs/one runs/two ...
    python scripts/study.py table results.json

`collect` takes each run's configuration and its newest sweep (`mythos sweep`), and replaces earlier results of the same
run. Runs that differ in the seed only share a line: mean and, of several, the range.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mythos.config.presets import PRESETS, preset_config
from mythos.config.sections import DepthConfig, OptimConfig
from mythos.errors import MythosError
from mythos.files.local import replacing
from mythos.model.config import ModelConfig

FIELDS = {
    "model": set(ModelConfig.model_fields) - {"preset"},
    "depth": {"mean", "backprop", "sampling"},
    "optim": {"name", "lr"},
}
"""Fields that distinguish architectures and how they were trained, by section."""
DEFAULTS = {"model": ModelConfig, "depth": DepthConfig, "optim": OptimConfig}
ONLY_LOOPED = {"loops", "injection", "lora_rank", "halting", *FIELDS["depth"]}
"""Fields of model and depth that mean nothing without a loop."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run one of the two commands; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="read runs, and write their results")
    collecting.add_argument("file", type=Path)
    collecting.add_argument("runs", type=Path, nargs="+")
    commands.add_parser("table", help="print results as a Markdown table").add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "table":
            print(table(read(options.file)))
            return 0
        results = read(options.file) if options.file.exists() else {}
        results |= {run.name: result(run) for run in options.runs}
        text = json.dumps(dict(sorted(results.items())), indent=1) + "\n"
        with replacing(options.file) as file:
            file.write_text(text)
        return 0
    except MythosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def read(file: Path) -> dict[str, Any]:
    """Results by run, as `collect` wrote them. Raises MythosError if the file holds something else."""
    try:
        results = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise MythosError(f"{file}: {error}; give a file that `collect` wrote") from None
    if not isinstance(results, dict) or not all(isinstance(one, dict) and "loops" in one for one in results.values()):
        raise MythosError(f"{file}: no results of runs; give a file that `collect` wrote")
    return results


def result(run: Path) -> dict[str, Any]:
    """Architecture, size and depth sweep of a run. Raises MythosError if it has no sweep."""
    from mythos.evaluation.depth_sweep import DepthSweep, newest_sweep  # imports torch, which takes seconds
    from mythos.planning.flops import count_parameters
    from mythos.reports.recorded import open_run

    newest = newest_sweep(run)
    if newest is None:
        raise MythosError(f"{run}: no depth sweep; run `mythos sweep {run}` first")
    recorded = open_run(run)
    config, (sweep, _) = recorded.config, DepthSweep.load(newest)
    architecture = config.model_dump(include=FIELDS)
    if (ramp := config.depth.curriculum).shape != "none":
        architecture["depth"]["curriculum"] = f"{ramp.shape} over {ramp.over:g}"
    return {
        "seed": config.run.seed,
        "architecture": architecture,
        "parameters": count_parameters(config.model).total,
        "tokens": recorded.last("tokens"),
        "training_flops": recorded.flops[-1],
        "mean_loops": sweep.mean_loops,
        "sequences": sweep.sequences,
        "loops": [
            {name: getattr(loop, name) for name in ("loops", "loss", "state_delta", "expert_overlap")}
            for loop in sweep.loops
        ],
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: one line for each architecture and number of tokens, by falling perplexity at the mean loops."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in results.values():
        groups.setdefault(json.dumps([one["architecture"], one["tokens"]], sort_keys=True), []).append(one)
    varying = varying_fields([one["architecture"] for one in results.values()])
    lines = []
    for runs in groups.values():
        mean = round(runs[0]["mean_loops"])
        at_mean, at_deepest = ([perplexity(run, loops) for run in runs] for loops in (mean, 8 * mean))
        overlap = [loop["expert_overlap"] for run in runs for loop in run["loops"] if loop["loops"] == mean]
        cells = [
            described(runs[0]["architecture"], varying),
            f"{runs[0]['tokens'] / 1e6:.1f}M",
            f"{runs[0]['training_flops']:.2e}",
            ", ".join(str(seed) for seed in sorted(run["seed"] for run in runs)),
            spread([perplexity(run, 1) for run in runs]),
            spread(at_mean) if mean > 1 else "",
            spread(at_deepest) if mean > 1 else "",
            spread(overlap),
        ]
        lines.append((sum(value or 0.0 for value in at_mean) / len(runs), " | ".join(cells)))
    head = "architecture | tokens | training FLOPs | seeds | 1 loop | mean loops | 8 times | expert overlap"
    ordered = [line for _, line in sorted(lines, reverse=True)]
    return "\n".join(f"| {line} |" for line in (head, " | ".join(["---"] * 8), *ordered))


def varying_fields(architectures: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Section and name of the fields that are not the same in all results; some have no `depth.curriculum`."""
    known = {(section, name) for one in architectures for section, fields in one.items() for name in fields}
    return {
        (section, name)
        for section, name in known
        if len({json.dumps(one[section].get(name)) for one in architectures}) > 1
    }


def described(architecture: dict[str, Any], varying: set[tuple[str, str]]) -> str:
    """The varying fields that differ from their defaults, and those of the optimizer in any case.

    A preset's name stands for its fields. Without a loop, fields that only a loop has are left out.
    """
    looped, preset = architecture["model"].get("injection") != "none", preset_of(architecture["model"])
    differing = [f"`{preset}`"] if preset else []
    differing += [
        f"`{section}.{name}={json.dumps(value)}`".replace('"', "")
        for section, fields in architecture.items()
        for name, value in fields.items()
        if (section, name) in varying
        and not (preset and section == "model")
        and (section == "optim" or value != DEFAULTS[section].model_fields[name].default)
        and (looped or section == "optim" or name not in ONLY_LOOPED)
    ]
    return " ".join(differing if looped else ["not looped", *differing]) or "(the defaults)"


def preset_of(model: dict[str, Any]) -> str | None:
    """The preset that has all these fields, whatever its vocabulary."""
    for name in PRESETS:
        fields = preset_config(name).model_dump(include=FIELDS["model"], mode="json")
        if fields | {"vocab_size": model.get("vocab_size")} == model:
            return name
    return None


def perplexity(run: dict[str, Any], loops: int) -> float | None:
    """Perplexity after a number of loops; None if the sweep did not read out there."""
    losses = [loop["loss"] for loop in run["loops"] if loop["loops"] == loops]
    return exp(losses[0]) if losses and losses[0] is not None else None


def spread(values: Sequence[float | None]) -> str:
    """Mean of figures and, of several, their range; empty if there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{sum(known) / len(known):.2f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.2f} to {max(known):.2f})"


if __name__ == "__main__":
    sys.exit(main())
