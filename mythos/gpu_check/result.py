"""What a check gets and what it gives back."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

SCRATCH = "gpu-check-files"
"""Folder in the report's for runs and whatever else a check writes."""
RATES = "rates.json"
PROFILE = "profile.txt"

Verdict = Literal["ok", "off", "failed", "not run"]


class Result(NamedTuple):
    """Outcome of one check."""

    verdict: Verdict
    """ok = as expected, off = measured, but not as expected, failed = no measurement, not run = says why."""
    measured: str
    """The figure with its unit, or the reason."""


def judged(as_expected: bool, measured: str) -> Result:
    """A measurement, ok or off."""
    return Result("ok" if as_expected else "off", measured)


def not_run(reason: str) -> Result:
    """A check that this machine cannot make."""
    return Result("not run", reason)


@dataclass(frozen=True)
class Setting:
    """Where a stage runs."""

    device: "torch.device"
    out: Path
    """Folder of the report."""
    deadline: float
    """Seconds of `time.time()` by which the stage should end."""

    @property
    def scratch(self) -> Path:
        """Folder for runs and other files."""
        return self.out / SCRATCH

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU. On a CPU all sizes are tiny: then the script is tested, and not the hardware."""
        return self.device.type == "cuda"
