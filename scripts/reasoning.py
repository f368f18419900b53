"""Ask models trained on a reasoning task for answers, by difficulty and loops.

python scripts/reasoning.py RUN [RUN ...] [--loops 1,2,4] [--difficulties 5,10,30] [--sequences N]

Writes step-XXXXXXXX.png, .csv and .json to reasoning/ in each run directory, and for several runs one picture of all.
docs/reasoning.md tells how to read them.
"""

import argparse
import sys
from pathlib import Path

import torch

from mythos.errors import MythosError
from mythos.evaluation.reasoning import AccuracyMap, accuracy_map, draw_maps, usual_difficulties
from mythos.model_files import open_model


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or a checkpoint step-* in one")
    parser.add_argument("--loops", type=numbers, metavar="N,N,...", help="loops (as many as the difficulties)")
    parser.add_argument(
        "--difficulties",
        type=numbers,
        metavar="N,N,...",
        help="steps to ask for (those of training, and some up to six times the hardest)",
    )
    parser.add_argument("--sequences", type=int, default=2048, metavar="N", help="of each difficulty (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (reasoning/ in each run directory)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto = cuda if there is one")
    options = parser.parse_args(arguments)
    if options.sequences < 1:
        parser.error(f"--sequences: got {options.sequences}; give at least 1")
    try:
        report(options)
    except MythosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def numbers(text: str) -> list[int]:
    """Increasing whole numbers from a list with commas."""
    try:
        given = sorted({int(part) for part in text.split(",")})
    except ValueError:
        given = [0]
    if given[0] < 1:
        raise argparse.ArgumentTypeError(f"got {text}; give whole numbers from 1 on, e.g. 1,2,4")
    return given


def report(options: argparse.Namespace) -> None:
    """Measure, write and print. Raises MythosError for what is no run on a task, or cannot be asked for."""
    maps: list[AccuracyMap] = []
    places: list[Path] = []
    for path in options.runs:
        one = measure(path, options)
        place = options.out or run_directory(path) / "reasoning"
        # Side by side in one folder, files are told apart by the name of the run.
        written = one.write(place / (one.name if options.out else f"step-{one.step:08d}"))
        maps.append(one)
        places.append(place)
        steps = [(d, one.at(d, d)) for d in one.difficulties if d in one.loops]
        print(
            f"{one.name}: right answers to {one.task}, {one.sequences} sequences each (* = trained on)\n{one.table()}"
        )
        if len(one.loops) > 1 and steps:
            print("with as many loops as steps: " + ", ".join(f"{d}: {value:.2%}" for d, value in steps))
        print("\n".join(map(str, written)) + "\n")
    if len(maps) > 1:
        print(draw_maps(maps, places[0] / "side-by-side.png"))


def run_directory(path: str) -> Path:
    """The directory of a run that is given by itself or by one of its checkpoints."""
    return Path(path).parent.parent if Path(path).name.startswith("step-") else Path(path)


def measure(path: str, options: argparse.Namespace) -> AccuracyMap:
    """The map of one run. Raises MythosError if it is no run on a task, or for more than its text can tell."""
    device = torch.device("cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise MythosError("--device: got cuda, and torch finds no GPU; give cpu or auto")
        device = torch.device("cuda")
    opened = open_model(path, device)
    if opened.run is None or opened.run.data.kind != "reasoning":
        kind = "an exported model" if opened.run is None else f"a run on data.kind {opened.run.data.kind}"
        raise MythosError(f"{path}: got {kind}; give runs on data.kind reasoning, e.g. of configs/reasoning-hops.yaml")
    task, fixed = opened.run.data.task, opened.model.config.injection == "none"
    difficulties = options.difficulties or usual_difficulties(task)
    if difficulties[-1] > task.hardest:
        raise MythosError(
            f"{path}: got a difficulty of {difficulties[-1]}; the text of this task can tell up to {task.hardest}. "
            "Give --difficulties up to that"
        )
    return accuracy_map(
        opened.model,
        task,
        name=opened.run.run.name,
        step=opened.step,
        difficulties=difficulties,
        loops=[1] if fixed else options.loops or difficulties,
        sequences=options.sequences,
        length=opened.run.data.sequence_length,
    )


if __name__ == "__main__":
    sys.exit(main())
