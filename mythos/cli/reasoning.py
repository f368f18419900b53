"""Ask models trained on a reasoning task for answers, by difficulty and loops.

Writes step-XXXXXXXX.png, .csv and .json to reasoning/ in each run directory; with --out DIR, NAME.png, .csv and .json
to DIR, where NAME is that of the run directory, with a number added where another run has it: hops, hops-2. The same to
reasoning/ in the current directory for a checkpoint that lies in no run directory. For several runs a picture of all,
side-by-side.png, comes beside the first. docs/reasoning.md tells how to read them.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mythos.cli.common import DEVICES, CommandParser, check_least, exit_status, whole_numbers, writing
from mythos.errors import MythosError

if TYPE_CHECKING:
    import torch

    from mythos.evaluation.reasoning import AccuracyMap


def parser(prog: str = "mythos reasoning") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or a checkpoint step-* in one")
    made.add_argument(
        "--loops",
        type=partial(whole_numbers, "--loops"),
        metavar="N,N,...",
        help="loops (as many as the difficulties; a fixed-depth model runs its core once)",
    )
    made.add_argument(
        "--difficulties",
        type=partial(whole_numbers, "--difficulties"),
        metavar="N,N,...",
        help="steps to ask for (those of training, and some up to six times the hardest)",
    )
    made.add_argument("--sequences", type=int, default=2048, metavar="N", help="of each difficulty (%(default)s)")
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="one folder for all files (reasoning/ in each run directory)"
    )
    made.add_argument("--device", choices=DEVICES, default="auto", help="auto (default) = cuda if there is one")
    return made


def main(arguments: list[str], prog: str = "mythos reasoning") -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: report(parser(prog).parse_args(arguments)))


def report(options: argparse.Namespace) -> None:
    """Measure, write and print.

    Raises MythosError for what is no run on a task, cannot be asked for, or cannot be written.
    """
    check_least(options, sequences=1)
    from mythos.distributed.ranks import choose_device
    from mythos.reports.evaluation_plots import draw_accuracy_maps
    from mythos.reports.recorded import run_names

    device = choose_device(options.device, option="--device")
    maps: list[AccuracyMap] = []
    stems: list[Path] = []
    for path, name in zip(options.runs, run_names(options.runs), strict=True):
        one = measure(path, name, options, device)
        stems.append(stem(path, one, options.out))
        maps.append(one)
        with writing(stems[-1].parent):
            written = one.write(stems[-1])
            picture = draw_accuracy_maps([one], stems[-1].with_name(f"{stems[-1].name}.png"))
        steps = [(d, one.at(d, d)) for d in one.difficulties if d in one.loops]
        print(
            f"{one.name}: right answers to {one.task}, {one.sequences} sequences each (* = trained on)\n{one.table()}"
        )
        if len(one.loops) > 1 and steps:
            print("with as many loops as steps: " + ", ".join(f"{d}: {value:.2%}" for d, value in steps))
        print("\n".join(map(str, [picture, *written])) + "\n")
    if len(maps) > 1:
        with writing(stems[0].parent):
            picture = draw_accuracy_maps(maps, stems[0].with_name("side-by-side.png"))
        print(picture)


def stem(path: str, made: AccuracyMap, out: Path | None) -> Path:
    """Where the files of a run's map go, without their endings."""
    from mythos.checkpoints.stored_model import run_directory

    run = run_directory(path)
    if out is None and run is not None:
        return run / "reasoning" / f"step-{made.step:08d}"
    return (out or Path("reasoning")) / made.name


def measure(path: str, name: str, options: argparse.Namespace, device: torch.device) -> AccuracyMap:
    """The map of one run, called `name`.

    Raises MythosError if it is no run on a task, or for more than its text can tell.
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
            f"{path}: got a difficulty of {difficulties[-1]}; the text of this task can tell up to {task.hardest}. "
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
