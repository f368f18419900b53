"""Compare several runs by tokens and by FLOPs needed."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos.config.checking import flat_fields
from mythos.errors import MythosError, short_reason, without_credentials
from mythos.files.local import numbered, replacing
from mythos.planning.flops import count_parameters
from mythos.progress import aligned
from mythos.reports.plots import draw_points
from mythos.reports.recorded import RecordedRun, open_run, run_names
from mythos.reports.style import Entry, Panel, after_warm_up, compose, describe, fit_range, loop_axis, save, series
from mythos.training.metrics import losses_by_depth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DATA = (
    *("kind", "path", "dataset", "subset", "split", "revision", "text_column", "filters", "task", "sources", "streams"),
    *("sequence_length", "mask_documents", "validation"),
)
"""Fields of data that decide what is trained on and validated on."""
PRINTED = {"run": "run", "parameters": "parameters", "tokens": "tokens", "flops": "FLOPs", "loss": "loss"}
PRINTED |= {"val_loss": "val loss", "val_loss_lowest": "lowest", "bits_per_byte": "bits/byte", "accuracy": "accuracy"}
"""Columns of the table for a terminal, with titles."""


@dataclass(frozen=True)
class Comparison:
    """At least one run, with names."""

    names: list[str]
    runs: list[RecordedRun]

    @cached_property
    def one_vocabulary(self) -> bool:
        """Whether all runs have the same vocabulary, so that their losses can be compared."""
        return len({run.vocabulary() for run in self.runs}) == 1

    def notes(self) -> list[str]:
        """Warnings about figures that are not comparable."""
        notes = []
        if not self.one_vocabulary:
            notes.append(
                "the runs have different vocabularies, so a loss per token says nothing: bits per byte are compared, "
                "of the validations alone; and a token is not the same amount of text, so look at FLOPs"
            )
        described = [run.config.data.model_dump(include=set(DATA)) for run in self.runs]
        differing = [f"data.{name}" for name in DATA if any(one[name] != described[0][name] for one in described)]
        if "data.revision" in differing:
            values = dict.fromkeys(str(one["revision"] or "none") for one in described)
            differing[differing.index("data.revision")] += f" ({' and '.join(values)})"
        if any(run.config.eval.batches != self.runs[0].config.eval.batches for run in self.runs):
            differing.append("eval.batches")
        if differing:
            notes.append(f"the runs are not validated on the same sequences: they differ in {', '.join(differing)}")
        return notes

    def rows(self) -> list[dict[str, Any]]:
        """One row per run; None where a run has no measurement."""
        rows = []
        for name, run in zip(self.names, self.runs, strict=True):
            parameters, last = count_parameters(run.config.model), run.records[-1]
            validation = run.validations[-1] if run.validations else {}
            rows.append(
                {
                    "run": name,
                    "parameters": parameters.total,
                    "active": parameters.active,
                    "step": last["step"],
                    "tokens": last["tokens"],
                    "flops": run.flops[-1],
                    "loss": run.last("loss"),
                    "val_loss": validation.get("val/loss"),
                    "val_loss_lowest": min(run.measured("val/loss"), default=None),
                    "bits_per_byte": validation.get("val/bits_per_byte"),
                    "accuracy": validation.get("val/accuracy"),
                    "auto_loops": validation.get("val/auto_loops"),
                    "tokens_per_second": run.last("tokens_per_second"),
                    "peak_memory_bytes": max(run.measured("peak_memory_bytes"), default=None),
                    "skipped_steps": run.last("skipped_steps"),
                    "directory": str(run.directory),
                }
            )
        return rows

    def cells(self) -> list[list[str]]:
        """The table that is shown, with titles in its first row and without columns that are empty for all runs."""
        formats = {"flops": ".3e", "accuracy": ".2%"} | dict.fromkeys(("parameters", "tokens"), ",")
        rows = self.rows()
        columns = [column for column in PRINTED if any(row[column] is not None for row in rows)]
        if not self.one_vocabulary:
            columns = [column for column in columns if "loss" not in column]
        cells = [[PRINTED[column] for column in columns]]
        for row in rows:
            values = {column: "" if row[column] is None else row[column] for column in columns}
            cells.append([v if isinstance(v, str) else f"{v:{formats.get(c, '.4f')}}" for c, v in values.items()])
        return cells

    def table(self) -> str:
        """The table for a terminal."""
        return aligned(self.cells(), left=1)

    def differences(self) -> list[list[str]]:
        """Fields of the configuration that differ between the runs, each with its value in every run."""
        configs = [dict(flat_fields(without_credentials(run.config.model_dump(mode="json")))) for run in self.runs]
        names = dict.fromkeys(name for config in configs for name in config if not name.startswith("run."))
        rows = []
        for name in names:
            values = [config.get(name) for config in configs]
            # As YAML writes it in one line.
            rows.append([name, *(value if isinstance(value, str) else json.dumps(value) for value in values)])
        return [row for row in rows if len(set(row[1:])) > 1]

    def own_stem(self, folder: Path) -> Path:
        """The first of compare, compare-2, ... in a folder that has no files, or those of a comparison of these runs.

        Raises MythosError if a file cannot be read.
        """
        directories = [str(run.directory) for run in self.runs]
        return next(
            stem
            for stem in numbered(folder / "compare")
            if compared_directories(stem.with_suffix(".csv")) == directories
            or not any(os.path.lexists(stem.with_suffix(suffix)) for suffix in (".csv", ".png", ".html"))
        )

    def write(self, folder: Path) -> list[Path]:
        """Write compare.csv and compare.png to a folder; returns their paths.

        Files of other runs there stay: the new ones are then called compare-2 and so on.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stem, rows = self.own_stem(folder), self.rows()
        with (
            replacing(stem.with_suffix(".csv")) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return [stem.with_suffix(".csv"), save(self.figure(), stem.with_suffix(".png"))]

    @property
    def measures(self) -> dict[str, tuple[str, str]]:
        """Metrics that are drawn over tokens and FLOPs, with their titles and labels."""
        if not self.one_vocabulary:
            return {"val/bits_per_byte": ("Bits per byte", "bits per byte in validation")}
        unit = "loss (nats per token)"
        return {"loss": ("Training loss", unit), "val/loss": ("Validation loss", unit)}

    def figure(self) -> Figure:
        """Plot losses over tokens and over FLOPs, and the last validation by loops."""
        return compose(self.panels(), self.key())

    def key(self) -> list[Entry]:
        """The names of the runs with the styles of their lines."""
        return [Entry(name, series(number)) for number, name in enumerate(self.names)]

    def panels(self) -> list[Panel]:
        """The plots in which at least one run has a line; runs with a single measurement show it as a point."""
        panels = []
        for key in self.measures:
            if max(len(run.measured(key)) for run in self.runs) > 1:
                draw = partial(self.draw_curves, key=key)
                panels += [Panel(partial(draw, over_flops=over), wide=False, height=3.2) for over in (False, True)]
        if any(len(losses_by_depth(run.validations[-1])) > 1 for run in self.runs if run.validations):
            panels.append(Panel(self.draw_depths))
        return panels

    def draw_curves(self, axes: Axes, key: str, over_flops: bool) -> None:
        """Plot a metric of each run over tokens or over FLOPs."""
        title, label = self.measures[key]
        unit = "FLOPs" if over_flops else "tokens"
        describe(axes, f"{title} over {unit}", "FLOPs needed" if over_flops else unit, label)
        late: list[float] = []
        for number, (name, run) in enumerate(zip(self.names, self.runs, strict=True)):
            points = [
                (cost if over_flops else record["tokens"], record[key])
                for record, cost in zip(run.records, run.flops, strict=True)
                if record.get(key) is not None
            ]
            style = series(number) | ({"alpha": 0.8, "linewidth": 1} if key == "loss" else {})
            draw_points(axes, points, label=f"_{name}", **style)
            late += after_warm_up(points)
        fit_range(axes, late)

    def draw_depths(self, axes: Axes) -> None:
        """Plot the last validation of each run by loops; a run without validation gets an empty line."""
        unit = "loss (nats per token)" if self.one_vocabulary else "bits per byte in validation"
        describe(axes, "Last validation by loops", "loops", unit)
        ticks: set[int] = set()
        for number, (name, run) in enumerate(zip(self.names, self.runs, strict=True)):
            last = run.validations[-1] if run.validations else {}
            curve = losses_by_depth(last)
            # The ratio of bits per byte to loss is the same at every depth.
            scale = 1.0 if self.one_vocabulary else last.get("val/bits_per_byte", 0) / last.get("val/loss", 1)
            draw_points(
                axes, [(loops, loss * scale) for loops, loss in curve.items()], label=f"_{name}", **series(number)
            )
            ticks |= curve.keys()
        fit_range(axes)
        loop_axis(axes, ticks)


def compared_directories(table: Path) -> list[str | None]:
    """The run directories in a compare.csv; empty if there is no such file, or it has none, as of earlier versions.

    Raises MythosError if it cannot be read.
    """
    try:
        with table.open(newline="", encoding="utf-8", errors="replace") as file:
            return [row.get("directory") for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (OSError, csv.Error) as error:
        raise MythosError(f"{table} cannot be read: {short_reason(error)}; give another folder with --out") from error


def compare(paths: Sequence[str]) -> Comparison:
    """Open runs to compare.

    Raises MythosError for no paths, for paths without a run with records, and for runs that have no metric in common.
    """
    if not paths:
        raise MythosError("got no runs; give run directories, e.g. runs/quickstart runs/mine")
    comparison = Comparison(run_names(paths), [open_run(path) for path in paths])
    for path, run in zip(paths, comparison.runs, strict=True):
        if not comparison.one_vocabulary and not run.is_text:
            raise MythosError(
                f"{path}: got a run on data.kind reasoning, whose tokens are no text, beside runs of another "
                "vocabulary; compare runs on the same task, or runs on text"
            )
    return comparison
