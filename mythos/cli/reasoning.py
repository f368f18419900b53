"""Measure the accuracy of models trained on a reasoning task, by difficulty and loops.

Writes step-XXXXXXXX.png, .csv and .json to reasoning/ in each run directory (in the current directory for a checkpoint
outside a run directory). With --out DIR writes NAME.png, .csv and .json to DIR, where NAME is that of the run
directory, numbered if several runs have it: hops, hops-2. For several runs also writes one picture of all,
side-by-side.png, beside the files of the first. Existing files stay: new ones then get a number, step-XXXXXXXX-2.
docs/reasoning.md explains them.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mythos.cli.common import (
    add_device_option,
    check_least,
    check_model_path,
    command_parser,
    whole_numbers,
)
from mythos.config.model_paths import run_directory
from mythos.errors import MythosError
from mythos.files.local import unused_stem, writing

if TYPE_CHECKING:
    import torch

    from mythos.evaluation.reasoning import AccuracyMap


def parser() -> argparse.ArgumentParser:
    parser = command_parser("reasoning", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or a checkpoint step-* in one")
    parser.add_argument(
        "--loops",
        type=partial(whole_numbers, "--loops"),
        metavar="N,N,...",
        help="loop counts (the same numbers as the difficulties; a fixed-depth model runs its core once)",
    )
    parser.add_argument(
        "--difficulties",
        type=partial(whole_numbers, "--difficulties"),
        metavar="N,N,...",
        help="steps of the questions (those of training, and some up to six times the hardest)",
    )
    parser.add_argument("--sequences", type=int, default=2048, metavar="N", help="per difficulty (%(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="one folder for all files (reasoning/ in each run directory)"
    )
    add_device_option(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Measure, write and print.

    Raises MythosError for runs that are not on a task, questions that the task cannot state, and files that cannot be
    written.
    """
    check_least(options, sequences=1)
    for path in options.runs:
        check_model_path(path)
    from mythos.distributed.ranks import choose_device
    from mythos.reports.evaluation_plots import draw_accuracy_maps
    from mythos.reports.recorded import run_names

    device = choose_device(options.device, option="--device")
    maps: list[AccuracyMap] = []
    folders: list[Path] = []
    for path, name in zip(options.runs, run_names(options.runs), strict=True):
        accuracy = measure(path, name, options, device)
        wanted = output_stem(path, accuracy, options.out)
        maps.append(accuracy)
        folders.append(wanted.parent)
        with writing(wanted.parent):
            wanted.parent.mkdir(parents=True, exist_ok=True)
            with unused_stem(wanted, "json", "csv", "png") as stem:
                paths = accuracy.write(stem)
                picture = draw_accuracy_maps([accuracy], stem.with_name(f"{stem.name}.png"))
        heading = f"{accuracy.name}: right answers to {accuracy.task}, {accuracy.sequences} sequences each"
        print(f"{heading} (* = trained on)\n{accuracy.table()}")
        steps = [(d, accuracy.at(d, d)) for d in accuracy.difficulties if d in accuracy.loops]
        if len(accuracy.loops) > 1 and steps:
            print("with as many loops as steps: " + ", ".join(f"{d}: {value:.2%}" for d, value in steps))
        print("\n".join(map(str, [picture, *paths])) + "\n")
    if len(maps) > 1:
        with writing(folders[0]), unused_stem(folders[0] / "side-by-side", "png") as stem:
            picture = draw_accuracy_maps(maps, stem.with_name(f"{stem.name}.png"))
        print(picture)


def output_stem(path: str, accuracy: AccuracyMap, out: Path | None) -> Path:
    """Return the path of a run's output files, without their suffixes."""
    run = run_directory(path)
    if out is None and run is not None:
        return run / "reasoning" / f"step-{accuracy.step:08d}"
    return (out or Path("reasoning")) / accuracy.name


def measure(path: str, name: str, options: argparse.Namespace, device: torch.device) -> AccuracyMap:
    """Measure the accuracy of one run, called `name`.

    Raises MythosError if it is not a run on a task, or for difficulties that its text cannot state.
    """
    from mythos.checkpoints.stored_model import open_model
    from mythos.evaluation.reasoning import accuracy_map, usual_difficulties

    opened = open_model(path, device)
    if opened.run is None or opened.run.data.kind != "reasoning":
        kind = "an exported model" if opened.run is None else f"a run on data.kind {opened.run.data.kind}"
        raise MythosError(f"{path}: got {kind}; give runs on data.kind reasoning, e.g. of configs/reasoning-hops.yaml")
    task, fixed = opened.run.data.task, opened.model.config.injection == "none"
    difficulties = sorted(set(options.difficulties or usual_difficulties(task)))
    if difficulties[-1] > task.hardest:
        raise MythosError(
            f"{path}: got a difficulty of {difficulties[-1]}; the text of this task can state up to {task.hardest}. "
            "Give --difficulties up to that"
        )
    return accuracy_map(
        opened.model,
        task,
        name=name,
        step=opened.step,
        difficulties=difficulties,
        loops=[1] if fixed else sorted(set(options.loops or difficulties)),
        sequences=options.sequences,
        length=opened.run.data.sequence_length,
    )
