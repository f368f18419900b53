"""Fuzz the readers of files: damage files thousands of times and check that each is read or refused.

python scripts/fuzz.py --inputs 20000 --seed 0

Configurations, overrides, models, checkpoints, tokenizers and data are edited at random places: bits, byte strings that
have crashed other readers, whole values of JSON and YAML. Each input must give a result or a MythosError, within 10 s
of processor time and 200 MB of additional memory. Input N of a seed is always the same: continue an interrupted run
with --first N, and repeat a fault with --first N --inputs 1. At the end a table is printed: reader, inputs, results,
refusals, faults. The exit status is 1 if there was a fault.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path has only its own folder
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")

PROGRESS_SECONDS = 30.0


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, metavar="N", help="number of inputs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs (%(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input (%(default)s)")
    parser.add_argument("--only", metavar="TEXT", help="only readers whose name contains TEXT")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.environ["MYTHOS_CACHE"] = folder
        return fuzz(options, Path(folder))


def fuzz(options: argparse.Namespace, folder: Path) -> int:
    """Try all inputs; returns the exit status."""
    from tests.fuzzing import build_targets, draw, try_input

    targets = [target for target in build_targets(folder) if (options.only or "") in target.name]
    logging.disable(logging.WARNING)  # readers warn about what they skip
    counts: Counter[tuple[str, str]] = Counter()
    last_shown = began = time.monotonic()
    for number in range(options.first, options.first + options.inputs):
        target, file, edits = draw(targets, f"{options.seed}/{number}")
        outcome = try_input(target, file, edits, folder / "copy")
        counts[target.name, outcome.kind] += 1
        if outcome.kind == "fault":
            print(f"FAULT {number}: {target.name}: {file}: {edits}\n{outcome.message}\n", flush=True)
        if time.monotonic() - last_shown > PROGRESS_SECONDS:
            last_shown = time.monotonic()
            faults = sum(count for (_, kind), count in counts.items() if kind == "fault")
            print(
                f"{number + 1 - options.first:,} inputs in {last_shown - began:.0f} s, {faults} faults", file=sys.stderr
            )
    kinds = ("result", "refusal", "fault")
    rows = [(target.name, *(counts[target.name, kind] for kind in kinds)) for target in targets]
    rows.append(("all", *(sum(row[column] for row in rows) for column in (1, 2, 3))))
    print("| reader | inputs | results | refusals | faults |\n|---|---|---|---|---|")
    for name, *cells in rows:
        print(f"| {name} | {sum(cells):,} | {' | '.join(f'{count:,}' for count in cells)} |")
    print(f"\nseed {options.seed}, {options.first} to {number}, {time.monotonic() - began:.0f} s")
    return 1 if rows[-1][3] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
