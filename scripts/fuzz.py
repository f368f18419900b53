"""Damage the files that this project reads, thousands of times, and see that each is read or refused.

python scripts/fuzz.py --inputs 20000 --seed 0

Configurations, overrides, models, checkpoints, tokenizers and data are edited at random places: bits, words that have
ended other readers, whole values of JSON and YAML. Each must give a result or a MythosError, within 10 s of processor
time and 200 MB of memory beyond what the process had. Input N of a seed is always the same: a run that was interrupted
goes on with --first N, and a fault is repeated by --first N --inputs 1. At the end a table is printed: reader, inputs,
results, refusals, faults. The exit status is 1 if there was a fault.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this sees only its own folder
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")

PROGRESS_SECONDS = 30.0


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs (%(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first (%(default)s)")
    parser.add_argument("--only", metavar="TEXT", help="only readers whose name has this in it")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.environ["MYTHOS_CACHE"] = folder
        return fuzz(options, Path(folder))


def fuzz(options: argparse.Namespace, folder: Path) -> int:
    """Try all inputs; returns the exit status."""
    from tests.fuzzing import build_targets, draw, try_input

    targets = [target for target in build_targets(folder) if (options.only or "") in target.name]
    logging.disable(logging.WARNING)  # readers warn of what they leave out
    counts: Counter[tuple[str, str]] = Counter()
    shown = began = time.monotonic()
    for number in range(options.first, options.first + options.inputs):
        target, file, edits = draw(targets, f"{options.seed}/{number}")
        outcome = try_input(target, file, edits, folder / "copy")
        counts[target.name, outcome.kind] += 1
        if outcome.kind == "fault":
            print(f"FAULT {number}: {target.name}: {file}: {edits}\n{outcome.told}\n", flush=True)
        if time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            faults = sum(count for (_, kind), count in counts.items() if kind == "fault")
            print(f"{number + 1 - options.first:,} inputs in {shown - began:.0f} s, {faults} faults", file=sys.stderr)
    kinds = ("result", "refusal", "fault")
    rows = [(target.name, *(counts[target.name, kind] for kind in kinds)) for target in targets]
    rows.append(("all", *(sum(row[column] for row in rows) for column in (1, 2, 3))))
    print("| reader | inputs | results | refusals | faults |\n|---|---|---|---|---|")
    for name, *found in rows:
        print(f"| {name} | {sum(found):,} | {' | '.join(f'{count:,}' for count in found)} |")
    print(f"\nseed {options.seed}, {options.first} to {number}, {time.monotonic() - began:.0f} s")
    return 1 if rows[-1][3] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
