"""Measurements of a run: metrics.jsonl first, then W&B and other trackers; utilisation, memory, stragglers."""

import codecs
import contextlib
import json
import logging
import os
import resource
import secrets
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mythos.config.checking import suggestion
from mythos.config.sections import Config
from mythos.errors import MythosError, import_optional, short_reason, without_credentials
from mythos.files.local import read_regular

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)

PEAK_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16 matrix products per second by part of the device's name, from the vendor's data sheets."""


FINISH_SECONDS = 60.0
"""How long W&B may upload what is left when the run ends, while other ranks wait; `wandb sync` uploads the rest."""

NO_AT_SIGN = {"mlflow", "swanlab"}
"""Trackers that refuse a key such as `val/loss@8`, which they get as `val/loss_at_8`."""


class MetricsLog:
    """Appends JSON objects to `metrics.jsonl`, and to the trackers of `log.wandb` and `log.trackers`.

    Continuing at `start_step` drops the lines of later steps that a killed run left: they will be written again. (W&B
    keeps the first it got of a step and ignores the others.) The first line then written has `resumed_from`, the step.
    A tracker that fails later on is left out with a warning. With `main` false, on every rank but 0, nothing is
    checked, started or written.

    A file with damaged lines is set aside as `metrics.jsonl.damaged-N`, and goes on with what is sound. `unfinished` is
    the record of `start_step` without its validation, as a checkpoint has it; it becomes :attr:`unfinished` unless the
    file has the validation.

    Raises MythosError for trackers that are unknown, not installed or cannot be started, before it changes any file.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        start_step: int,
        main: bool = True,
        unfinished: dict[str, Any] | None = None,
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.main = main
        self.first = {"resumed_from": start_step} if start_step else {}
        self.trackers: list[GeneralTracker] = []
        self.unfinished: dict[str, Any] | None = None
        """The record that is to be completed by a validation and written; not in the file."""
        if not main:
            return
        self.trackers = start_trackers(run_dir, config, start_step)
        kept = [record for record in sound_records(self.path) if record["step"] <= start_step] if start_step else []
        if unfinished is not None and not any(r["step"] == start_step and "val/loss" in r for r in kept):
            self.unfinished = unfinished
            kept = [record for record in kept if record["step"] < start_step]
        aside = self.path.with_name(self.path.name + ".tmp")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        aside.replace(self.path)
        self.file = self.path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must have `step`."""
        if not self.main:
            return
        self.file.write(json.dumps(record | self.first) + "\n")
        self.first = {}
        self.file.flush()
        values = {key: value for key, value in record.items() if key != "step" and value is not None}
        plain = {key.replace("@", "_at_"): value for key, value in values.items()}

        def log(tracker: "GeneralTracker") -> None:
            shown = plain if tracker.name in NO_AT_SIGN else values
            charts = wandb_charts(record) if tracker.name == "wandb" else {}
            tracker.log(shown | charts, step=record["step"])

        self._each(log)

    def close(self) -> None:
        """Finish the file and the trackers."""
        if self.main:
            self.file.close()
            self._each(lambda tracker: tracker.finish())
            self.trackers = []

    def _each(self, act: Callable[["GeneralTracker"], None]) -> None:
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except Exception as error:  # a service that went away must not end a run of weeks
                self.trackers.remove(tracker)
                logger.warning(
                    "%s failed (%s: %s) and is left out until the run is continued; metrics.jsonl has everything",
                    tracker.name,
                    type(error).__name__,
                    _reason(error),
                )


def losses_by_depth(record: dict[str, float]) -> dict[int, float]:
    """The `val/loss@<loops>` of a record, by number of loops, shallowest first."""
    prefix = "val/loss@"
    losses = {int(key.removeprefix(prefix)): value for key, value in record.items() if key.startswith(prefix)}
    return dict(sorted(losses.items()))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The sound records of a metrics.jsonl, none where there is no file. Warns of damaged lines, which are left out.

    Raises OSError for what is no file or cannot be read.
    """
    records, damaged = scan_metrics(path)
    if damaged:
        logger.warning("%s: %s", path, damaged_lines(damaged))
    return records


def scan_metrics(
    path: Path, needed: Callable[[dict[str, Any]], Sequence[str]] = lambda _: ("step",)
) -> tuple[list[dict[str, Any]], list[str]]:
    """The sound records of a metrics.jsonl, and what is wrong with each damaged line, in words.

    A sound record is a JSON object whose `step` is a whole number, whose other values are numbers or null, and that has
    what is `needed` of it. A last line that a kill cut short is no damage. Raises OSError as :func:`read_metrics`.
    """
    try:
        content = read_regular(path)
    except FileNotFoundError:
        return [], []
    records, damaged = [], []
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        # Where power was lost, a file system may leave zeros in the place of what was being written.
        text = line.strip(b"\0 \t\r")
        problem = "zeros" if text != line.strip() else None
        if text:
            try:
                record = json.loads(text)  # raises UnicodeDecodeError, a ValueError, too
            except (ValueError, RecursionError):
                problem = None if number == len(lines) and not problem else "not JSON"
            else:
                wrong = _unsound(record, needed)
                problem = f"no number for {', '.join(wrong)}" if wrong else problem
                if not wrong:
                    records.append(record)
        if problem:
            damaged.append(f"line {number} has {problem}")
    return records, damaged


def _unsound(record: Any, needed: Callable[[dict[str, Any]], Sequence[str]]) -> list[str]:
    """What has no number in a record: `step`, what else is needed, and values that are neither numbers nor null."""
    fields = record if isinstance(record, dict) else {}
    wrong = [key for key in needed(fields) if fields.get(key) is None]
    wrong += [key for key, value in fields.items() if type(value) not in (int, float, type(None))]
    step = fields.get("step", 0)
    return wrong if "step" in wrong or (type(step) is int and step >= 0) else ["step", *wrong]


def sound_records(path: Path) -> list[dict[str, Any]]:
    """The sound records of a metrics.jsonl that is about to be written anew; a damaged file is set aside before."""
    try:
        records, damaged = scan_metrics(path)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise MythosError(f"{path} cannot be read ({error.strerror}): check its owner") from error
        records, damaged = [], [f"it cannot be read ({error.strerror})"]
    if damaged:
        aside = next(free for number in count(1) if not os.path.lexists(free := Path(f"{path}.damaged-{number}")))
        path.rename(aside)
        logger.warning(
            "%s: %s. It is set aside as %s, and the sound records go on", path, damaged_lines(damaged), aside
        )
    return records


def damaged_lines(damaged: list[str]) -> str:
    """What :func:`scan_metrics` says of damaged lines, in short."""
    others = f", and {len(damaged) - 1:,} others are damaged too" if len(damaged) > 1 else ""
    return f"{damaged[0]}{others}"


def check_trackers(names: list[str]) -> None:
    """Raise MythosError if `log.trackers` has a name accelerate does not know or whose package is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    installed = {str(kind) for kind in get_available_trackers()}
    missing = {str(kind) for kind in LoggerType} - installed
    for name in names:
        if name == "wandb":
            raise MythosError("log.trackers: got wandb, which has a section of its own; set log.wandb.mode=online")
        known = sorted(LOGGER_TYPE_TO_CLASS.keys() - {"wandb"})
        if name not in known:
            raise MythosError(f"log.trackers: got {name}; {suggestion(name, known)}")
        if name in missing:
            raise MythosError(f"log.trackers: {name} is not installed; run `pip install {name}`")


def start_trackers(run_dir: Path, config: Config, start_step: int) -> "list[GeneralTracker]":
    """The trackers of the configuration, W&B first, each given the configuration without its credentials.

    Raises MythosError for names that :func:`check_trackers` refuses and for a tracker that cannot be started.
    """
    settings = config.log.wandb
    check_trackers(config.log.trackers)
    if settings.mode == "disabled" and not config.log.trackers:
        return []
    if settings.mode != "disabled":
        import_optional("wandb", f"log.wandb.mode: {settings.mode}")
    # accelerate takes a second to import, and a run may never need it
    from accelerate.state import PartialState
    from accelerate.utils import patch_environment

    # Its trackers need a PartialState, which under torchrun's variables takes a device and, where there is no process
    # group, waits for the other ranks to start one. Only this rank has trackers: let it see a process that is alone.
    with patch_environment(LOCAL_RANK=-1, ACCELERATE_TORCH_DEVICE="cpu"):
        PartialState()
    trackers = []
    if settings.mode != "disabled":
        try:
            trackers.append(start_wandb(run_dir, config, start_step))
        except Exception as error:
            raise MythosError(
                f"log.wandb.mode is {settings.mode}, but W&B cannot be started: {_reason(error)}. Run "
                "`wandb login`, or set log.wandb.mode to offline or disabled."
            ) from error
    for name in dict.fromkeys(config.log.trackers):
        try:
            trackers.append(start_tracker(name, run_dir, config, start_step))
        except Exception as error:
            raise MythosError(
                f"log.trackers: {name} cannot be started: {_reason(error)}. Set it up as its "
                "documentation says, or remove it from log.trackers."
            ) from error
    return trackers


def start_wandb(run_dir: Path, config: Config, start_step: int) -> "GeneralTracker":
    """A W&B run, the same one over all resumes: its id is kept in `wandb_id`.

    `wandb agent` gives the runs of a sweep their ids, in WANDB_RUN_ID.
    """
    from accelerate.tracking import WandBTracker

    id_file = run_dir / "wandb_id"
    if start_step == 0 or not id_file.exists():
        id_file.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8))
    settings = config.log.wandb
    tracker = WandBTracker(
        settings.project,
        mode=settings.mode,
        entity=settings.entity,
        tags=settings.tags,
        name=config.run.name,
        id=id_file.read_text(),
        resume="allow",
        dir=str(run_dir),
        config=without_credentials(config.model_dump(mode="json")),
        settings={"finish_timeout": FINISH_SECONDS},
    )
    with _arguments_without_credentials():
        tracker.start()
    # Panels are drawn over tokens, and tables of runs show the best validation loss beside the last of all else.
    tracker.run.define_metric("tokens")
    tracker.run.define_metric("*", step_metric="tokens")
    tracker.run.define_metric("val/loss", step_metric="tokens", summary="min")
    return tracker


def wandb_charts(record: dict[str, Any]) -> dict[str, Any]:
    """The curve of loss by loops of a validation as a chart of W&B, `val/depth`; nothing for other records."""
    curve = losses_by_depth(record)
    if not curve:
        return {}
    import wandb

    table = wandb.Table(columns=["loops", "loss"], data=[list(point) for point in curve.items()])
    return {"val/depth": wandb.plot.line(table, "loops", "loss", title="Validation loss by depth")}


def start_tracker(name: str, run_dir: Path, config: Config, start_step: int) -> "GeneralTracker":
    """A tracker of accelerate; those that write files do so in the run directory, in a folder of their name."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    place = [str(run_dir / name)] if kind.requires_logging_directory else []
    # TensorBoard then hides what a killed run wrote of the steps that come again.
    options = {"purge_step": start_step + 1} if name == "tensorboard" else {}
    tracker = kind(config.run.name, *place, **options)
    tracker.start()
    if start_step == 0 or name != "tensorboard":  # which would show every resume as another run
        tracker.store_init_configuration(_scalars(without_credentials(config.model_dump(mode="json"))))
    return tracker


def _reason(error: Exception) -> str:
    """What to tell of another library's error, which may name the address of a service with its password."""
    return short_reason(error).rstrip(".")


@contextlib.contextmanager
def _arguments_without_credentials() -> Iterator[None]:
    """Hide credentials in this process's command line, which W&B records."""
    arguments, sys.argv = sys.argv, without_credentials(sys.argv)
    try:
        yield
    finally:
        sys.argv = arguments


def _scalars(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted path, whatever is not a number or a string as JSON."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _scalars(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str) else json.dumps(value)
    return flat


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def over_ranks(reports: list[dict[str, float]]) -> dict[str, float]:
    """What a log window amounts to over all ranks, from every rank's report in the order of the ranks.

    A report has `peak_memory_bytes` and `own_seconds`, the time the rank spent on its own work: data and forward
    passes, under FSDP data only, because its forward passes wait for the others. The result has the largest
    `peak_memory_bytes` and, of several ranks, about the slowest one: `straggler/rank`, its number; `straggler/seconds`,
    its own_seconds minus the median of all ranks; and `straggler/over_median`, its own_seconds divided by that median.
    """
    reduced = {"peak_memory_bytes": max(report["peak_memory_bytes"] for report in reports)}
    if len(reports) > 1:
        own = [report["own_seconds"] for report in reports]
        slowest, median = max(own), statistics.median(own)
        reduced["straggler/seconds"] = slowest - median
        reduced["straggler/rank"] = own.index(slowest)
        if median > 0:
            reduced["straggler/over_median"] = slowest / median
    return reduced


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak rate of matrix products of a known GPU in bfloat16, in FLOP/s; None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_BF16_FLOPS.items() if part in name), None)


def expert_balance(load: torch.Tensor) -> dict[str, float]:
    """`moe/load_max_over_mean` and `moe/dead_experts` from counts (core layers, loop indices, experts).

    The first is the largest share any expert has in any layer, over the mean share; an expert is dead if no loop of the
    step sent it a token.
    """
    by_expert = load.sum(1).double()
    return {
        "moe/load_max_over_mean": (by_expert.amax(-1) / by_expert.mean(-1)).max().item(),
        "moe/dead_experts": int((by_expert == 0).sum().item()),
    }


def loop_loads(load: torch.Tensor | None) -> dict[str, float]:
    """`moe/load_max_over_mean@<loop>` from the same counts, for the loops that tokens ran; empty without experts.

    The last one counts all deeper loops too.
    """
    if load is None:
        return {}
    counts = load.double()
    busiest = (counts.amax(-1) / counts.mean(-1)).amax(0).tolist()
    return {f"moe/load_max_over_mean@{loop}": share for loop, share in enumerate(busiest, start=1) if share == share}
