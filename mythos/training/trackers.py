"""Services that get every record of a run: W&B (log.wandb) and accelerate's other trackers (log.trackers)."""

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos.config.checking import flat_fields, suggestion
from mythos.config.sections import Config
from mythos.errors import MythosError, import_optional, short_reason, without_credentials

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

FINISH_SECONDS = 60.0
"""Seconds that W&B may upload at the end of a run, while other ranks wait; `wandb sync` uploads the rest."""


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
    """Start the configured trackers, W&B first; each gets the configuration without its credentials.

    Raises MythosError for names that :func:`check_trackers` refuses and for a tracker that cannot be started.
    """
    settings = config.log.wandb
    check_trackers(config.log.trackers)
    if settings.mode == "disabled" and not config.log.trackers:
        return []
    if settings.mode != "disabled":
        import_optional("wandb", f"log.wandb.mode: {settings.mode}")
    # Imported here: accelerate takes a second, and most runs need no tracker.
    from accelerate.state import PartialState
    from accelerate.utils import patch_environment

    # accelerate's trackers need a PartialState. Under torchrun's variables it would take a device and, without a
    # process group, wait for other ranks to start one. Only this rank has trackers, so let it see a single process.
    with patch_environment(LOCAL_RANK=-1, ACCELERATE_TORCH_DEVICE="cpu"):
        PartialState()
    trackers = []
    if settings.mode != "disabled":
        try:
            trackers.append(start_wandb(run_dir, config, start_step))
        except Exception as error:
            raise MythosError(
                f"log.wandb.mode is {settings.mode}, but W&B cannot be started: {tracker_error(error)}. Run "
                "`wandb login`, or set log.wandb.mode to offline or disabled."
            ) from error
    for name in dict.fromkeys(config.log.trackers):
        try:
            trackers.append(start_tracker(name, run_dir, config, start_step))
        except Exception as error:
            raise MythosError(
                f"log.trackers: {name} cannot be started: {tracker_error(error)}. Set it up as its "
                "documentation says, or remove it from log.trackers."
            ) from error
    return trackers


def start_wandb(run_dir: Path, config: Config, start_step: int) -> "GeneralTracker":
    """Start a W&B run, or continue the one whose id is in the run directory's `wandb_id`.

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
    # Plot over tokens; tables of runs show the best validation loss, and the last value of everything else.
    tracker.run.define_metric("tokens")
    tracker.run.define_metric("*", step_metric="tokens")
    tracker.run.define_metric("val/loss", step_metric="tokens", summary="min")
    return tracker


def wandb_depth_chart(curve: dict[int, float]) -> dict[str, Any]:
    """A validation's curve of loss by loops as a chart of W&B, `val/depth`; empty without a curve."""
    if not curve:
        return {}
    import wandb

    table = wandb.Table(columns=["loops", "loss"], data=[list(point) for point in curve.items()])
    return {"val/depth": wandb.plot.line(table, "loops", "loss", title="Validation loss by depth")}


def start_tracker(name: str, run_dir: Path, config: Config, start_step: int) -> "GeneralTracker":
    """Start a tracker of accelerate. Its files, if it writes any, are in the run directory, in a folder of its name."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    folder = [str(run_dir / name)] if kind.requires_logging_directory else []
    # TensorBoard then hides records of a killed run whose steps are trained again.
    options = {"purge_step": start_step + 1} if name == "tensorboard" else {}
    tracker = kind(config.run.name, *folder, **options)
    tracker.start()
    if start_step == 0 or name != "tensorboard":  # TensorBoard would show every resume as another run
        fields = flat_fields(without_credentials(config.model_dump(mode="json")))
        # Trackers take numbers and strings; other values are stored as JSON.
        tracker.store_init_configuration(
            {path: value if isinstance(value, int | float | str) else json.dumps(value) for path, value in fields}
        )
    return tracker


def tracker_error(error: Exception) -> str:
    """The first line of a tracker's error. It may name the address of a service with its password, which is removed."""
    return short_reason(error).rstrip(".")


@contextlib.contextmanager
def _arguments_without_credentials() -> Iterator[None]:
    """Hide credentials in this process's command line, which W&B records."""
    arguments, sys.argv = sys.argv, without_credentials(sys.argv)
    try:
        yield
    finally:
        sys.argv = arguments
