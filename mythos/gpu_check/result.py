"""A check's input (`Setting`) and output (`Result`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

SCRATCH = "gpu-check-files"
"""Subfolder of the report's folder for runs and other files of checks."""
RATES = "rates.json"
PROFILE = "profile.txt"

Verdict = Literal["ok", "off", "failed", "not run"]


class Result(NamedTuple):
    """Outcome of one check."""

    verdict: Verdict
    """ok: as expected. off: measured, but not as expected. failed: no measurement. not run: `measured` says why."""
    measured: str
    """The figure with its unit, or the reason."""


def judged(as_expected: bool, measured: str) -> Result:
    """A measurement: ok or off."""
    return Result("ok" if as_expected else "off", measured)


def not_run(reason: str) -> Result:
    """A check that cannot run on this machine."""
    return Result("not run", reason)


@dataclass(frozen=True)
class Setting:
    """Device, folders and deadline of a stage."""

    device: "torch.device"
    out: Path
    """The report's folder."""
    deadline: float
    """`time.time()` at which the stage should end."""

    @property
    def scratch(self) -> Path:
        """Folder for runs and other files of checks."""
        return self.out / SCRATCH

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU. On a CPU all sizes are tiny: that tests the checks, not the hardware."""
        return self.device.type == "cuda"
