"""Run a claim about looped transformers as an experiment, and judge it.

`mythos claims NAME` trains what is missing, measures, and writes results.json, verdict.md and figure.png to
results/claims/NAME/; the same command continues after an interruption. `mythos claims list` shows all claims with their
verdicts; `mythos claims check` recomputes verdicts and figures from the results. docs/claims.md explains them.
"""

from __future__ import annotations

import argparse
import glob
from pathlib import Path
from typing import TYPE_CHECKING

from mythos.cli.common import check_least, command_parser, exit_status
from mythos.errors import MythosError

if TYPE_CHECKING:
    from mythos.claims.runner import Task

STOPPED = "\nstopped; the same command continues"


def parser() -> argparse.ArgumentParser:
    parser = command_parser("claims", __doc__)
    parser.add_argument("name", metavar="NAME", help="a claim, or: list = show all claims, check = recompute results")
    parser.add_argument(
        "--size", default="nano", help="nano = a CPU (default), small = one GPU, full = prints commands to launch"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds of every run (the claim's, usually 3)")
    parser.add_argument(
        "--data", metavar="PATH", help="text files to train on (the text that is installed with mythos)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (results/claims/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs, their cost and time, and stop")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="list, check: folder of all results (results/claims)"
    )
    parser.add_argument(
        "--write", action="store_true", help="check: write verdicts, pictures and docs/claims.md anew from the results"
    )
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    return exit_status(lambda: run(options), interrupted=STOPPED)


def run(options: argparse.Namespace) -> None:
    """List, check, plan or run. Raises MythosError for wrong options, and if a check finds something."""
    refuse_unused(options)
    if options.name == "list":
        print(listing(options.results))
    elif options.name == "check":
        check(options.results, options.write)
    else:
        run_one(options)


def refuse_unused(options: argparse.Namespace) -> None:
    """Raise MythosError for options that the chosen action does not use."""
    of_a_claim = {"--seeds": options.seeds, "--data": options.data, "--out": options.out}
    of_a_claim |= {"--dry-run": options.dry_run or None, "--size": None if options.size == "nano" else options.size}
    of_all = {"--results": options.results, "--write": options.write or None}
    if options.name == "check":
        wrong = of_a_claim
    elif options.name == "list":
        wrong = of_a_claim | {"--write": of_all["--write"]}
    else:
        wrong = of_all
    if given := [name for name, value in wrong.items() if value is not None]:
        raise MythosError(f"{', '.join(given)}: not for `mythos claims {options.name}`")


def task_of(options: argparse.Namespace) -> Task:
    """Check the options of a claim, before any work."""
    from mythos.claims import results
    from mythos.claims.definition import load_claim
    from mythos.claims.runner import Task

    claim = load_claim(options.name, options.size)
    check_least(options, seeds=1)
    if options.seeds is not None and options.seeds > 1000:
        raise MythosError(f"--seeds: got {options.seeds}; give at most 1000")
    if options.data is not None and not claim.on_text:
        raise MythosError(f"--data: {claim.name} trains on no text; leave it out")
    if options.data is not None and not glob.glob(options.data, recursive=True):
        raise MythosError(f"--data: {options.data}: there is no such file; give text files, e.g. 'texts/*.txt'")
    out = options.out or results.FOLDER / (claim.name if options.data is None else f"{claim.name}-own-text")
    if options.out is None and claim.size != "nano":
        out = results.FOLDER / f"{claim.name}-{claim.size}"
    return Task(claim, options.seeds or claim.at_size.seeds, options.data, out)


def run_one(options: argparse.Namespace) -> None:
    """Plan, launch or run one claim."""
    task = task_of(options)
    from mythos.claims.plan import plan_text, write_launches
    from mythos.claims.runner import collect_finished, run_claim

    if options.dry_run:
        print(plan_text(task))
    elif task.claim.size == "full":
        collected = collect_finished(task)
        print(plan_text(task))
        if commands := write_launches(task):
            print("\nLaunch these runs, then give this command again: it collects finished ones and judges.")
            if task.claim.tune:
                print("It also names the runs of other seeds, once seed 0 has chosen values of the tuning grid.")
            print("\n".join(commands))
        elif collected:
            print(f"\n{collected.outcome}: {collected.why}")
    else:
        run_claim(task)
        print(f"written  {task.out}")


def listing(root: Path | None) -> str:
    """A line for each claim: name, verdict, number, and what is claimed."""
    from mythos.claims import results
    from mythos.claims.definition import claim_names
    from mythos.claims.verdict_page import outcome_line

    rows = []
    for name in claim_names():
        claim, _, judgement = outcome_line(name, (root or results.FOLDER) / name)
        rows.append((name, judgement.outcome, judgement.number, claim.definition.claim))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}\n{'':<{widths[0]}}  {d}" for a, b, c, d in rows)


def check(root: Path | None, rewrite: bool) -> None:
    """Recompute what is committed. Raises MythosError with everything that differs."""
    from mythos.claims import results
    from mythos.claims.check import PAGE, problems, write

    folder = root or results.FOLDER
    page = PAGE if root is None else Path()  # the page has the table of the committed results
    if rewrite:
        write(folder, page)
    if found := list(problems(folder, page)):
        raise MythosError("\n  ".join([f"{len(found)} of the claims' files differ", *found]))
    print("every verdict and figure is what the results yield")
