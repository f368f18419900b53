"""Score a trained model on tasks, at several depths in one call.

MODEL is a run directory, a checkpoint or an exported folder. Writes step-XXXXXXXX.json, .csv and .png to evaluation/ in
the run directory, and prints a table. Under torchrun the processes share the work. docs/evaluation.md tells more.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos.cli.common import (
    CommandParser,
    add_measuring_options,
    check_least,
    exit_status,
    positive_numbers,
    whole_numbers,
    writing,
)
from mythos.errors import MythosError, log_messages

if TYPE_CHECKING:
    from mythos.checkpoints.stored_model import OpenedModel
    from mythos.distributed.ranks import World
    from mythos.evaluation.continuations import DepthSetting
    from mythos.evaluation.results import Result


def parser(prog: str = "mythos evaluate") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("path", metavar="MODEL", help="run directory, checkpoint step-*, or exported folder")
    made.add_argument(
        "--tasks",
        type=names,
        default=[],
        metavar="TASK,...",
        help="files of questions (*.jsonl), and tasks of lm-evaluation-harness by name (extra eval)",
    )
    made.add_argument("--include-path", type=Path, metavar="DIR", help="folder with YAML files of further tasks")
    made.add_argument("--data", metavar="GLOB", help="text files for bits per byte (without tasks: the run's own)")
    made.add_argument(
        "--loops",
        type=depths,
        metavar="N,N,...|auto",
        help="loops to score at; auto = as the halting rule decides, at most the training mean (1, the mean and auto)",
    )
    made.add_argument("--halting", metavar="RULE", help="rule of halting that auto means (the model's)")
    made.add_argument(
        "--exit-threshold",
        type=partial(positive_numbers, "--exit-threshold"),
        metavar="X,...",
        help="of the halting rule, one or several (the rule's)",
    )
    made.add_argument("--limit", type=int, metavar="N", help="most questions, documents or sequences of a task")
    made.add_argument("--fewshot", type=int, metavar="N", help="examples before each question of harness tasks")
    add_measuring_options(made, "evaluation")
    return made


def main(arguments: list[str], prog: str = "mythos evaluate") -> int:
    """Run the command line; returns the exit status."""
    log_messages()
    return exit_status(lambda: run(parser(prog).parse_args(arguments)))


def run(options: argparse.Namespace) -> None:
    """Open, score, write and print. Raises MythosError for what cannot be opened, scored or written."""
    check_least(options, limit=1, fewshot=0, micro_batch=1)
    from mythos.distributed.ranks import meet_world

    world = meet_world(options.device, option="--device")
    try:
        evaluate(options, world)
    except MythosError:  # which all processes meet; after anything else, others would be waited for in vain
        world.leave()
        raise
    world.leave()


def evaluate(options: argparse.Namespace, world: World) -> None:
    """What `run` does, in one of several processes."""
    from mythos.checkpoints.stored_model import open_model, run_directory
    from mythos.data.tasks import TaskSet
    from mythos.evaluation.choices import choice_scores, encode_task, read_tasks
    from mythos.evaluation.continuations import score_requests
    from mythos.evaluation.results import choice_results, save, table, text_results
    from mythos.evaluation.text import as_in_training, require_tokenizer, text_scores, validation_data
    from mythos.model.layers import autocast_to
    from mythos.reports.evaluation_plots import draw_scores

    # What can be refused is refused before anything long begins.
    files = [name for name in options.tasks if name.endswith(".jsonl")]
    of_harness = [name for name in options.tasks if name not in files]
    choices = world.ranks.agreed(lambda: read_tasks(files, what="--tasks", limit=options.limit))
    opened = world.ranks.agreed(lambda: open_model(options.path, world.device))
    model = opened.model
    settings = settings_of(opened, options)
    tokenizer = require_tokenizer(opened)
    loaded = world.in_turn(lambda: harness_tasks(of_harness, options.include_path)) if of_harness else None
    out = options.out or (run_directory(options.path) or Path()) / "evaluation"
    world.ranks.agreed(lambda: check_writable(out) if world.rank == 0 else None)
    dtype, micro_batch = as_in_training(opened, world.device, options.dtype, options.micro_batch)
    common: dict[str, Any] = {"micro_batch": micro_batch, "world": world, "autocast": autocast_to(dtype, world.device)}

    results: list[Result] = []
    about: dict[str, Any] = {"source": opened.source, "step": opened.step, "dtype": str(dtype).removeprefix("torch.")}
    if options.data is not None or not options.tasks:
        data = world.in_turn(lambda: validation_data(opened, options.data, options.limit))
        assert not isinstance(data, TaskSet)  # whose run has no tokenizer
        name = options.data or "validation"
        for setting, found in zip(settings, text_scores(model, data, settings, **common), strict=True):
            results += text_results(name, found, setting, len(data.ids))
    for task in choices:
        encoded = encode_task(task, tokenizer, model.config.context_length)
        scored = score_requests(model, encoded.requests, settings, progress=world.rank == 0, **common)
        for setting, scores in zip(settings, scored, strict=True):
            results += choice_results(task, choice_scores(task, scores), setting)
    if loaded is not None:
        from mythos.evaluation.harness import HarnessModel, run_tasks

        seen = HarnessModel(opened, settings, progress=world.rank == 0, **common)
        results += run_tasks(seen, loaded, limit=options.limit, fewshot=options.fewshot)
    if world.rank == 0:
        stem = out / f"step-{opened.step:08d}"
        with writing(out):
            written = [*save(results, stem, about), draw_scores(results, out / f"{stem.name}.png")]
        print(f"\n{table(results)}")
        print("\nwritten  " + "\n         ".join(map(str, written)))


def check_writable(folder: Path) -> None:
    """Make the folder. Raises MythosError if it cannot be written to."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def settings_of(opened: OpenedModel, options: argparse.Namespace) -> list[DepthSetting]:
    """What the options ask to score at. Raises MythosError for what the model cannot run."""
    from mythos.evaluation.continuations import choose_settings

    mean = 1 if opened.model.config.injection == "none" else opened.mean_loops
    loops = options.loops or [1, mean, None]
    for option in ("halting", "exit_threshold"):
        if getattr(options, option) is not None and None not in loops:
            raise MythosError(f"--{option.replace('_', '-')} is for auto: add it to --loops, e.g. --loops 1,8,auto")
    try:
        return choose_settings(opened.model, mean, loops, options.halting, options.exit_threshold or ())
    except ValueError as error:
        raise MythosError(str(error)) from error


def harness_tasks(tasks: list[str], include_path: Path | None) -> dict[str, Any]:
    """The tasks of lm-evaluation-harness. Raises MythosError where it is not installed, or has them not."""
    try:
        from mythos.evaluation.harness import open_tasks
    except ImportError as error:
        raise MythosError(
            f"--tasks: {tasks[0]!r} is no .jsonl file, and lm-evaluation-harness, whose task it may be, cannot be "
            f"imported ({error}): pip install 'mythos-rdt[eval]'"
        ) from error
    return open_tasks(tasks, include_path)


def depths(text: str) -> list[int | None]:
    """Parse 1,8,auto, auto being None. Raises MythosError for anything else."""
    given: list[int | None] = []
    for part in text.split(","):
        given += [None] if part.strip() == "auto" else whole_numbers("--loops", part, besides="auto, or ")
    return given


def names(text: str) -> list[str]:
    """Parse a.jsonl,hellaswag. Raises MythosError for an empty name."""
    found = [part.strip() for part in text.split(",")]
    if "" in found:
        raise MythosError(f"--tasks: got {text!r}; give .jsonl files or names of tasks, separated by commas")
    return found
