"""Checkpoints that are either complete or not there: written aside, renamed, and marked last.

`step-N/` holds torch.distributed.checkpoint shards in the safetensors format (no pickle), `meta.json` with everything
that is not a tensor, and the empty file `committed`, without which a directory does not count.
"""

import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from mythos.errors import MythosError

MARKER = "committed"
META = "meta.json"
SPARE_BYTES = 1 << 20
"""Room for meta.json and file system overhead asked for beside the tensors."""


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that training continues from, by name; the tensors are the live ones, not copies.

    `model.<name>` for parameters and buffers, `optim.<name>.<exp_avg | exp_avg_sq | step>`.
    """
    parameters = dict(model.named_parameters())
    state = {f"model.{name}": tensor.detach() for name, tensor in (parameters | dict(model.named_buffers())).items()}
    for name, parameter in parameters.items():
        state |= {f"optim.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return state


def save(directory: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write `directory/step-N` and commit it; returns its path.

    Raises MythosError when the disk is full or cannot be written; what was saved before stays as it was.
    """
    final = directory / f"step-{step:08d}"
    aside = final.with_name(final.name + ".tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        needed = sum(tensor.nbytes for tensor in tensors.values()) + SPARE_BYTES
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise OSError(f"{needed:,} bytes are needed and {free:,} are free")
        aside.mkdir()
        _write_tensors(aside, tensors)
        (aside / META).write_text(json.dumps({"step": step, **meta}, indent=1))
        for path in (*aside.iterdir(), aside):
            _sync(path)
        remove(final)  # only now that its replacement is whole
        aside.rename(final)
        (final / MARKER).touch()
        for path in (final, directory):
            _sync(path)
        pointer = directory / "latest.tmp"
        pointer.write_text(final.name)
        pointer.replace(directory / "latest")
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        newest = complete_checkpoints(directory)[-1:]
        kept = f"the newest complete checkpoint is {newest[0]}" if newest else "there is no earlier checkpoint"
        raise MythosError(
            f"checkpoint of step {step} could not be written to {directory}: {error}; {kept}. "
            "Free some space (or set run.dir to another disk, checkpoint.keep lower) and run the same command again."
        ) from error
    return final


def remove(path: Path) -> None:
    """Delete a checkpoint, if it exists; one that is interrupted here no longer counts as complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _write_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    with warnings.catch_warnings(), quiet("torch.distributed.checkpoint"):
        warnings.simplefilter("ignore")  # that no process group exists is as intended
        writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
        try:
            dcp.save(tensors, storage_writer=writer, no_dist=True)
        except CheckpointException as error:
            raise OSError(_first_cause(error)) from error


def _first_cause(error: CheckpointException) -> str:
    """The underlying message of a BaseException that otherwise prints every rank's whole traceback."""
    cause = next(iter(error.failures.values()))[0]
    return f"{type(cause).__name__}: {cause}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class quiet:
    """Silence a logger below ERROR for the duration of a with block."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        self.logger.setLevel(self.level)


def complete_checkpoints(directory: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    return sorted(marker.parent for marker in directory.glob(f"step-*[0-9]/{MARKER}"))


def find(directory: Path, resume: str) -> Path | None:
    """The checkpoint that `run.resume` means, or None to start from the beginning.

    A path counts while the run has no checkpoint of its own: the same command, given again, continues the run.
    Raises MythosError for a path that is no complete checkpoint or one of this run's that has successors, and for
    `never` where there are checkpoints already.
    """
    complete = complete_checkpoints(directory)
    if resume == "auto":
        return complete[-1] if complete else None
    if resume == "never":
        if complete:
            raise MythosError(
                f"run.resume is never, but {complete[-1]} exists: choose another run.name or run.dir, move the old "
                "checkpoints away, or set run.resume=auto to continue from it"
            )
        return None
    path = Path(resume)
    if not (path / MARKER).exists():
        found = ", ".join(map(str, complete)) or "none in this run's directory"
        raise MythosError(
            f"run.resume={resume} is no complete checkpoint (a directory step-* with a file '{MARKER}'); "
            f"complete ones: {found}"
        )
    if complete and path.resolve() in [own.resolve() for own in complete[:-1]]:
        raise MythosError(
            f"run.resume={resume} has successors up to {complete[-1]}: to go back, move those away, or set run.dir to "
            "a new directory"
        )
    return complete[-1] if complete else path


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises MythosError if it cannot be read."""
    try:
        return json.loads((path / META).read_text())
    except (OSError, ValueError) as error:
        raise MythosError(f"checkpoint {path} is damaged: {META}: {error}") from error


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place from a checkpoint with the same names and shapes.

    Raises MythosError, before anything is changed, for a checkpoint of another model (the first differing names are
    listed), and for one that is damaged.
    """
    with warnings.catch_warnings(), quiet("torch.distributed.checkpoint"):
        warnings.simplefilter("ignore")
        try:
            saved = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        except Exception as error:
            raise MythosError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
        here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        there = {name: tuple(entry.size) for name, entry in saved.items()}
        if here != there:
            differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            lines = [
                f"  {name}: {there.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} in the model"
                for name in differing[:5]
            ]
            raise MythosError(
                f"checkpoint {path} is of another model: {len(differing)} tensors differ, first\n"
                + "\n".join(lines)
                + "\nUse the config.yaml it was written with, or another run.name."
            )
        try:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
        except CheckpointException as error:
            raise MythosError(f"checkpoint {path} is damaged: {_first_cause(error)}") from error


def prune(directory: Path, keep: int, keep_every: int) -> None:
    """Remove all but the newest `keep` checkpoints and multiples of `keep_every`, and all that is not complete."""
    complete = complete_checkpoints(directory)
    kept = complete[-keep:] + [path for path in complete if keep_every and step_of(path) % keep_every == 0]
    for path in directory.glob("step-*"):
        if path not in kept:
            remove(path)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))
