"""Differences between a checkpoint's configuration and that of the run that continues it, and what they mean."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mythos.config.checking import Problems, flat_fields, shown, valid_values
from mythos.config.inherited import RUN_FILE
from mythos.config.loading import complete_stored_data, save_config
from mythos.config.sections import Config
from mythos.data.difficulty import hardest
from mythos.files.local import write_whole
from mythos.files.storage import step_name
from mythos.training.depth_schedule import DepthSchedule
from mythos.training.lr import learning_rate

NOT_COMPARED = {"run.name", "run.dir", "run.resume", "run.on_change", "checkpoint.dir"}
"""Fields that say where a run and its checkpoints are and how it continues, not how it trains."""
LEARNING_RATE = {f"optim.{name}" for name in ("lr", "schedule", "warmup", "decay", "min_lr")}
SCHEDULED_BY = ("train.", "optim.", "depth.", "data.", "eval.", "model.loops", "model.injection")
"""Fields from which :func:`consequences` computes what it says, or sections of them."""
VALIDATION = {"eval.batches", "data.validation.path", "data.validation.fraction"}
ABSENT = object()


class Change(NamedTuple):
    """A field whose value differs, as plain values; ABSENT for a source of a mixture that is not there."""

    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        before, after = ("absent" if value is ABSENT else shown(value) for value in self[1:])
        return f"{self.field} {before} -> {after}"


def config_changes(config: Config, saved: dict[str, Any]) -> list[Change]:
    """Compare every field with a checkpoint's configuration, given as plain values."""
    former, refused = _former(saved)
    values = (former.model_dump(mode="json"), config.model_dump(mode="json"))
    before, after = ({key: v for key, v in flat_fields(sections) if v != {}} for sections in values)
    before |= refused
    pairs = ((field, before.get(field, ABSENT), after.get(field, ABSENT)) for field in [*after, *before])
    differing = {field: Change(field, old, new) for field, old, new in pairs if old != new}
    return [change for field, change in differing.items() if field not in NOT_COMPARED]


def consequences(config: Config, saved: dict[str, Any], step: int, changes: list[Change]) -> list[str]:
    """Say in words which changes give the steps after `step` another meaning than the ones before; [] if none do.

    Other data is refused or read from its beginning by `data.on_mismatch`.
    """
    former, refused = _former(saved)
    if step >= config.train_steps:
        return []
    if unknown := [field for field in refused if field.startswith(SCHEDULED_BY)]:
        return [
            f"{', '.join(unknown)}: this version does not accept the checkpoint's value, so it cannot say what the "
            f"differences mean for the learning rate, the depths and the data after step {step:,}"
        ]
    fields = {change.field for change in changes}
    lines = []
    if former.tokens_per_step != config.tokens_per_step or "train.global_batch" in fields:
        lines.append(
            f"batch: a step takes {_batch(config)} tokens, it took {_batch(former)}. Compare losses by tokens and not "
            "by steps; the learning rate suited the former batch"
        )
    if fields & LEARNING_RATE:
        rate, unchanged = (learning_rate(one.optim, step, one.schedule_steps) for one in (config, former))
        lines.append(f"learning rate: the next step takes {rate:.3g}, unchanged it would take {unchanged:.3g}")
    here, there = (_depths(one, step, config.schedule_steps) for one in (config, former))
    if here != there:
        lines.append(
            f"depth: sequences now run {here}; they ran {there}. Training losses before and after step {step:,} are at "
            f"different depths, and val/loss is measured at {round(config.depth_mean)} loops (it was at "
            f"{round(former.depth_mean)})"
        )
    if "data.sequence_length" in fields or "data.mask_documents" in fields:
        lines.append("data: documents continue where they were, but are cut into sequences, or seen, in another way")
    if any(field.startswith("data.sources.") and field.endswith(".weight") for field in fields):
        lines.append("data order: sources are read in other shares from here, each continuing where it was")
    if fields & VALIDATION or "data.sequence_length" in fields:
        lines.append("validation: losses before and after are of different sequences and cannot be compared")
    old, new = former.schedule_steps, config.schedule_steps
    before, after = ({}, {}) if old == new else (_scheduled(config, step, steps) for steps in (old, new))
    moved = [f"{what} from {value} to {after[what]}" for what, value in before.items() if value != after[what]]
    if moved:
        lines.append(
            f"the schedule took {old:,} steps in the checkpoint and takes {new:,} here (train.steps, train.tokens or "
            f"optim.schedule_steps): at step {step:,} this moves {', '.join(moved)}. "
            f"Set optim.schedule_steps={old} to keep the old schedule; steps beyond it keep its last values"
        )
    return lines


def save_configuration(run_dir: Path, config: Config, meta: dict[str, Any], changes: list[Change]) -> None:
    """Write config.yaml. If it has `changes` from the checkpoint's, that one stays as config.step-XXXXXXXX.yaml.

    `meta` is the checkpoint's meta.json, empty for a new run. Raises OSError.
    """
    if changes:
        former = yaml.safe_dump(meta["config"], sort_keys=False, allow_unicode=True)
        write_whole(run_dir / former_file(meta["step"]), former)
    save_config(config, run_dir / RUN_FILE)


def former_file(step: int) -> str:
    """Name of the file with the configuration that a run had up to a step at which it changed."""
    return f"config.{step_name(step)}.yaml"


def _former(saved: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """A checkpoint's configuration, and by dotted path the values in it that this version does not accept.

    In the configuration these have their defaults, as have fields that the checkpoint's version did not know.
    """
    problems = Problems("", Config)
    values = valid_values(Config, saved, problems)
    complete_stored_data(values.get("data", {}))
    refused = {
        field: value
        for field, value in flat_fields(saved)
        if any(f"{field}.".startswith(f"{path}.") for path in problems.paths)
    }
    return Config.model_validate(values), refused


def _batch(config: Config) -> str:
    return f"{config.train.global_batch} x {config.data.sequence_length} = {config.tokens_per_step:,}"


def _depths(config: Config, step: int, steps: int) -> str:
    """Describe the distribution of depths: at the end of its ramps and, if they still rise, in the next step.

    `steps` is the length of the schedule, whose changes have a message of their own.
    """
    schedule = DepthSchedule(config.with_fields("optim", schedule_steps=steps))
    mean, backprop = schedule.mean(step), schedule.backprop(step)
    if (mean, backprop) == (config.depth_mean, config.depth_backprop):
        return config.depth_summary
    return f"{config.depth_summary} (in the next step {mean:.3g}, and {backprop})"


def _scheduled(config: Config, step: int, steps: int) -> dict[str, str]:
    """Values of all schedules in a step if they take `steps` in all, by name, as text for people."""
    depth = DepthSchedule(config.with_fields("optim", schedule_steps=steps))
    values = {
        "the learning rate": f"{learning_rate(config.optim, step, steps):.3g}",
        "the mean depth": f"{depth.mean(step):.3g}",
        "the loops with gradient": f"{depth.backprop(step)}",
    }
    if config.data.kind == "reasoning":
        values["the highest difficulty"] = f"{hardest(config.data.task, step, steps)}"
    return values
