"""Score a trained model on tasks, at several depths in one call.

MODEL is a run directory, a checkpoint or an exported folder. Prints a table and writes to evaluation/ in the run
directory: step-XXXXXXXX_TASKS_loops-DEPTHS.json and .png, with a number if there are such files, and a line for each
score at the end of results.csv. Under torchrun the processes share the work. docs/evaluation.md explains the scores.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos.cli.common import (
    add_measuring_options,
    check_least,
    check_model_path,
    comma_separated,
    command_parser,
    measuring_folder,
    positive_numbers,
    whole_numbers,
)
from mythos.errors import MythosError
from mythos.files.local import unused_stem, writing

if TYPE_CHECKING:
    from mythos.checkpoints.stored_model import OpenedModel
    from mythos.distributed.ranks import World
    from mythos.evaluation.continuations import DepthSetting
    from mythos.evaluation.results import Result


def parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("path", metavar="MODEL", help="run directory, checkpoint step-*, or exported folder")
    parser.add_argument(
        "--tasks",
        type=task_names,
        default=[],
        metavar="TASK,...",
        help="files of questions (*.jsonl), and tasks of lm-evaluation-harness by name (extra eval)",
    )
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with YAML files of further tasks")
    parser.add_argument("--data", metavar="GLOB", help="text files for bits per byte (without tasks: the run's own)")
    parser.add_argument(
        "--loops",
        type=loop_settings,
        metavar="N,N,...|auto",
        help="loop counts to score; auto = up to the training mean, by the halting rule (1, the mean and auto)",
    )
    parser.add_argument("--halting", metavar="RULE", help="halting rule of auto (the model's)")
    parser.add_argument(
        "--exit-threshold",
        type=partial(positive_numbers, "--exit-threshold"),
        metavar="X,...",
        help="one or several thresholds of the halting rule (the rule's)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="maximum questions, documents or sequences of a task")
    parser.add_argument("--fewshot", type=int, metavar="N", help="examples before each question of harness tasks")
    add_measuring_options(parser, "evaluation")
    return parser


def run(options: argparse.Namespace) -> None:
    """Open, score, write and print. Raises MythosError if one of these is impossible."""
    check_least(options, limit=1, fewshot=0, micro_batch=1)
    check_model_path(options.path)
    from mythos.distributed.ranks import meet_world

    world = meet_world(options.device, option="--device")
    try:
        evaluate(options, world)
    except MythosError:
        # All processes raise it, so leaving, which waits for all, ends. After other errors it could wait forever.
        world.leave()
        raise
    world.leave()


def evaluate(options: argparse.Namespace, world: World) -> None:
    """Do the work of `run` in one of several processes."""
    from mythos.checkpoints.stored_model import open_model
    from mythos.data.tasks import TaskSet
    from mythos.evaluation.choices import choice_scores, encode_task, read_tasks
    from mythos.evaluation.continuations import score_requests
    from mythos.evaluation.execution import Execution
    from mythos.evaluation.results import choice_results, table, text_results
    from mythos.evaluation.text import as_in_training, text_scores, validation_data
    from mythos.model.layers import autocast_to

    # Check all input before any long computation.
    files = [name for name in options.tasks if name.endswith(".jsonl")]
    harness_names = [name for name in options.tasks if name not in files]
    choices = world.ranks.agreed(lambda: read_tasks(files, what="--tasks", limit=options.limit))
    opened = world.ranks.agreed(lambda: open_model(options.path, world.device))
    model = opened.model
    settings = depth_settings(opened, options)
    tokenizer = opened.require_tokenizer()
    harness = world.in_turn(lambda: harness_tasks(harness_names, options.include_path)) if harness_names else None
    out = measuring_folder(options, "evaluation")
    world.ranks.agreed(lambda: check_writable(out) if world.rank == 0 else None)
    dtype, micro_batch = as_in_training(opened, world.device, options.dtype, options.micro_batch)
    execution = Execution(micro_batch, world, autocast_to(dtype, world.device), progress=world.rank == 0)

    results: list[Result] = []
    data_name = options.data or (None if options.tasks else "validation")
    if data_name is not None:
        data = world.in_turn(lambda: validation_data(opened, options.data, options.limit))
        assert not isinstance(data, TaskSet)  # a run on a task has no tokenizer, so require_tokenizer raised
        for setting, scores in zip(settings, text_scores(model, data, settings, execution), strict=True):
            results += text_results(data_name, scores, setting, len(data.ids))
    for task in choices:
        encoded = encode_task(task, tokenizer, model.config.context_length)
        likelihoods = score_requests(model, encoded.requests, settings, execution)
        for setting, of_setting in zip(settings, likelihoods, strict=True):
            results += choice_results(task, choice_scores(task, of_setting), setting)
    if harness is not None:
        from mythos.evaluation.harness import HarnessModel, run_tasks

        harness_model = HarnessModel(opened, settings, execution)
        results += run_tasks(harness_model, harness, limit=options.limit, fewshot=options.fewshot)
    if world.rank == 0:
        about = {"source": opened.source, "step": opened.step, "dtype": str(dtype).removeprefix("torch.")}
        about |= {"limit": options.limit, "fewshot": options.fewshot}
        names = [task.name for task in choices] + harness_names
        if data_name is not None:
            names.insert(0, data_name)
        paths = write(results, out, about, names, settings)
        print(f"\n{table(results)}")
        print("\nwritten  " + "\n         ".join(map(str, paths)))


def write(
    results: list[Result], out: Path, about: dict[str, Any], names: list[str], settings: list[DepthSetting]
) -> list[Path]:
    """Write the files of an evaluation beside those of earlier ones, and its lines into the table; returns the paths.

    Raises MythosError if they cannot be written.
    """
    from mythos.evaluation.results import append_to_table, file_name, save
    from mythos.reports.evaluation_plots import draw_scores

    name = file_name(about["step"], names, settings, about["limit"], about["fewshot"])
    with writing(out):
        with unused_stem(out / name, "json", "png") as stem:
            document = save(results, stem, about)
            picture = draw_scores(results, stem.with_name(f"{stem.name}.png"))
        table = append_to_table(results, document, about)
    return [path for path in (document, picture, table) if path is not None]


def check_writable(folder: Path) -> None:
    """Create the folder. Raises MythosError if it cannot be written to."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def depth_settings(opened: OpenedModel, options: argparse.Namespace) -> list[DepthSetting]:
    """Return the depths to score at. Raises MythosError for depths or rules that the model cannot run."""
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
    """Open tasks of lm-evaluation-harness. Raises MythosError if it is not installed, or does not know them."""
    try:
        from mythos.evaluation.harness import open_tasks
    except ImportError as error:
        raise MythosError(
            f"--tasks: {tasks[0]!r} is no .jsonl file, and lm-evaluation-harness, whose task it may be, cannot be "
            f"imported ({error}): pip install 'mythos-rdt[eval]'"
        ) from error
    return open_tasks(tasks, include_path)


def loop_settings(text: str) -> list[int | None]:
    """Parse 1,8,auto, with None for auto. Raises MythosError for anything else."""
    loops: list[int | None] = []
    for part in text.split(","):
        loops += [None] if part.strip() == "auto" else whole_numbers("--loops", part, besides="auto, or ")
    return loops


def task_names(text: str) -> list[str]:
    """Parse a.jsonl,hellaswag. Raises MythosError for an empty name."""
    names = comma_separated(text)
    if "" in names:
        raise MythosError(f"--tasks: got {text!r}; give .jsonl files or names of tasks, separated by commas")
    return names
