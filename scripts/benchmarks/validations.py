"""Memory of a run over many validations, which must not grow."""

import argparse
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import psutil

from mythos.cli.common import check_least
from mythos.config.loading import load_config
from mythos.trainer import Trainer

WARM_UP = 50
"""Validations before memory is measured, until caches are filled and the heap has its final size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("config", nargs="?", default="debug", metavar="CONFIG.yaml", help="configuration (debug)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="fields to override")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="validations to measure (%(default)s)")


class MeasuredTrainer(Trainer):
    """Records the resident bytes of the process before each validation."""

    resident: ClassVar[list[int]] = []

    def validate(self) -> dict[str, float]:
        """Record the resident bytes, then validate as the trainer does."""
        self.resident.append(psutil.Process().memory_info().rss)
        return super().validate()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train with a validation after every step; returns the resident bytes at each validation."""
    check_least(options, count=1)
    with tempfile.TemporaryDirectory() as directory:
        settings = [f"train.steps={WARM_UP + options.count}", "eval.every=1", "checkpoint.every=0", "data.workers=0"]
        settings += ["depth.sampling=fixed", "depth.curriculum=null"]  # deeper steps would need more memory
        config = load_config(options.config, [*options.overrides, *settings, f"run.dir={Path(directory) / 'run'}"])
        MeasuredTrainer(config).run()
    resident = MeasuredTrainer.resident
    first, last = resident[WARM_UP - 1], resident[-1]
    growth = (last - first) / options.count
    print(
        f"resident memory: {first / 2**20:.1f} MiB after {WARM_UP} validations, {last / 2**20:.1f} MiB after "
        f"{options.count} more: {growth / 1e3:+.1f} kB a validation"
    )
    return {"resident_bytes": resident, "growth_bytes_a_validation": growth}
