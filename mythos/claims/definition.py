"""The definition of a claim: what it says, how it is judged, and the runs of each of its sizes."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from mythos.config.checking import PLAIN_TEXT, Problems, read_yaml, shortened, shown, suggestion
from mythos.config.loading import config_from_dict, overridden
from mythos.config.sections import Config
from mythos.errors import MythosError
from mythos.files.text import unusable_text
from mythos.section import Section

FOLDER = Path(__file__).parents[1] / "configs" / "claims"
"""In a checkout configs/claims/; an installation has a folder of its own."""

SIZES = ("nano", "small", "full")
SizeName = Literal["nano", "small", "full"]
ENOUGH_SEEDS = 3
"""Seeds that a verdict needs."""

MOST_RUNS = 10_000
"""Most runs of a claim, with every value of the tuning grid for every seed."""
MOST_NAME = 200
"""Longest name of a run; file systems allow 255 bytes, and files beside it have longer names."""

Overrides = dict[str, Any]
"""Values by the full names of fields: {optim.lr: 0.003}."""
Seeds = Annotated[int, Field(ge=1, le=1000)]


class SizeSection(Section):
    """What the runs of one size change, and how many there are."""

    set: Overrides = {}
    """Fields of all runs of this size; an arm's own values override them."""
    arms: dict[str, Overrides] | None = None
    """Arms of this size, instead of those of the claim."""
    grid: dict[str, list[Any]] | None = None
    """Grid of this size, instead of that of the claim."""
    tune: dict[str, list[Any]] | None = None
    """Tuning grid of this size, instead of that of the claim."""
    measure: dict[str, dict[str, Any]] | None = None
    """Measurements of this size, instead of those of the claim."""
    seeds: Seeds = ENOUGH_SEEDS
    """Runs of each arm and grid point, with seeds from 0."""


class ClaimSection(Section):
    """A claim: a file of configs/claims/."""

    claim: str
    """What is claimed, in one sentence."""
    source: str
    """Who says it."""
    hypothesis: str
    """What must be measured for the claim to be supported."""
    metric: str
    """The figures that decide, and how they are computed."""
    falsified_by: str
    """The result that would show the claim to be wrong."""
    thresholds: dict[str, float] = {}
    """Numbers that the verdict compares with."""
    base: dict[str, Any] = {}
    """The configuration that all runs share, by sections."""
    arms: dict[str, Overrides] = {}
    """What is compared: fields that differ from the base, by the name of the arm. Without arms nothing is trained."""
    grid: dict[str, list[Any]] = {}
    """Values of fields that every arm is run with, for every seed."""
    tune: dict[str, list[Any]] = {}
    """Values of fields among which every arm gets the best: the lowest `val/loss` of seed 0 at the end of training."""
    measure: dict[str, dict[str, Any]] = {}
    """Measurements of every finished run, with their options; see `mythos.claims.measures`."""
    once: dict[str, dict[str, Any]] = {}
    """Measurements that need no run."""
    sizes: dict[SizeName, SizeSection]
    """nano: at most 60 minutes on 2 CPU cores; small: at most an hour on one GPU; full: GPUs."""


@dataclass(frozen=True)
class PlannedRun:
    """A run that a claim needs."""

    arm: str
    point: Overrides
    """Values of the grid and the tuning grid."""
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """The run's name, unique in its claim and size."""
        return run_name(self.arm, self.point, self.seed)


@dataclass(frozen=True)
class Claim:
    """A claim at one size."""

    name: str
    size: SizeName
    definition: ClaimSection

    @property
    def at_size(self) -> SizeSection:
        """The section of this size."""
        return self.definition.sizes[self.size]

    @property
    def arms(self) -> dict[str, Overrides]:
        """Overrides by arm."""
        return self.definition.arms if self.at_size.arms is None else self.at_size.arms

    @property
    def grid(self) -> dict[str, list[Any]]:
        """Values of every grid field."""
        return self.definition.grid if self.at_size.grid is None else self.at_size.grid

    @property
    def tune(self) -> dict[str, list[Any]]:
        """Values of every tuned field."""
        return self.definition.tune if self.at_size.tune is None else self.at_size.tune

    @property
    def measure(self) -> dict[str, dict[str, Any]]:
        """Measurements of every finished run."""
        return self.definition.measure if self.at_size.measure is None else self.at_size.measure

    @property
    def thresholds(self) -> dict[str, float]:
        """Numbers that the verdict compares with."""
        return self.definition.thresholds

    @property
    def on_text(self) -> bool:
        """Whether its runs train on text, which `--data` can replace."""
        return bool(self.arms) and self.definition.base.get("data", {}).get("kind", "embedded") != "reasoning"

    def digest(self) -> str:
        """Hash of everything that this size depends on: a result names the definition it was made with."""
        content = self.definition.model_dump(mode="json")
        content["sizes"] = {self.size: content["sizes"][self.size]}
        text = json.dumps(content, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def place_of(self, arm: str, point: Overrides) -> str:
        """Arm and grid values as text, without tuned values: where a best value of the tuning grid is chosen."""
        return place_name(arm, {path: value for path, value in point.items() if path in self.grid})

    def runs(
        self, seeds: int, directory: Path, data: str | None, best: Mapping[str, Overrides] | None = None
    ) -> list[PlannedRun]:
        """All runs in their order, seed by seed; tuned arms run all values of the tuning grid with seed 0.

        Args:
            seeds: number of seeds.
            directory: parent of the run directories.
            data: path of text instead of the base's; None = the base's.
            best: the chosen values of the tuning grid by arm and grid point (:func:`place_name`). Where they are not
                known yet, the first values stand for them.

        Raises MythosError for values that are no valid configuration.
        """
        count = seeds * len(self.arms) * math.prod(map(len, [*self.grid.values(), *self.tune.values()]))
        if count > MOST_RUNS:
            raise MythosError(
                f"claim {self.name}, size {self.size}: got {count:,} runs; at most {MOST_RUNS:,} are allowed"
            )
        planned = []
        for seed in range(seeds):
            for arm, overrides in self.arms.items():
                for grid_point in points(self.grid):
                    tuned = list(points(self.tune))
                    if seed > 0:
                        tuned = [(best or {}).get(place_name(arm, grid_point), tuned[0])]
                    for values in tuned:
                        point = {**grid_point, **values}
                        config = self._config(arm, overrides | point, point, seed, directory, data)
                        planned.append(PlannedRun(arm, point, seed, config))
        return planned

    def _config(
        self, arm: str, overrides: Overrides, point: Overrides, seed: int, directory: Path, data: str | None
    ) -> Config:
        """The configuration of one run."""
        name = run_name(arm, point, seed)
        if Path(name).name != name or len(name.encode()) > MOST_NAME:
            raise MythosError(
                f"claim {self.name}, size {self.size}: {shortened(name)} cannot name a run's folder: arms and values "
                f"of a grid must have no / and at most {MOST_NAME} characters together; set long values in arms"
            )
        run: Overrides = {"run.name": f"{self.name}-{name}", "run.dir": str(directory / name), "run.seed": seed}
        if data is not None:
            run |= {"data.kind": "files", "data.path": data}
        source, fields = f"claim {self.name}, size {self.size}, arm {arm}", {**self.at_size.set, **overrides, **run}
        assignments = [f"{path}={json.dumps(value)}" for path, value in fields.items()]
        values = overridden(dict(self.definition.base), assignments, source)
        try:
            return built(json.dumps(values))
        except MythosError as error:
            raise MythosError(f"{source}: {error}") from error


@cache
def built(values: str) -> Config:
    """A configuration from JSON; kept, because a claim of many runs asks for each of them after every run."""
    return config_from_dict(json.loads(values))


def points(grid: Mapping[str, Sequence[Any]]) -> Iterator[Overrides]:
    """All combinations of a grid's values; one without values for no grid."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def place_name(arm: str, point: Overrides) -> str:
    """An arm and its values as text, e.g. `lti-lr=0.003`."""
    return "-".join([arm, *(f"{path.rpartition('.')[2]}={value}" for path, value in point.items())])


def run_name(arm: str, point: Overrides, seed: int) -> str:
    """The name of a run in its claim and size."""
    return f"{place_name(arm, point)}-seed{seed}"


def _check_plain(values: dict[str, Any], problems: Problems) -> None:
    """Report values that are not JSON, such as YAML's dates: definitions are hashed and runs configured as JSON."""
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            problems.add(f"{name!s}", f"{error}; allowed: text, finite numbers, true, false, null, lists and mappings")
        if unusable_text(name) or unusable_text(value):
            problems.add(f"{name!a}", f"allowed: {PLAIN_TEXT}")


def _check_grids(definition: ClaimSection, problems: Problems) -> None:
    """Report grids without values, and a `data` of the base that is no section."""
    if not isinstance(definition.base.get("data", {}), dict):
        problems.add("base.data", f"got {shown(definition.base['data'])}; allowed: a section")
    sections: list[tuple[str, ClaimSection | SizeSection]] = [("", definition)]
    sections += [(f"sizes.{size}.", section) for size, section in definition.sizes.items()]
    for prefix, section in sections:
        for name in ("grid", "tune"):
            for path, choices in (getattr(section, name) or {}).items():
                if not choices:
                    problems.add(f"{prefix}{name}.{path}", "got []; allowed: a list of one value or more")


def claim_names() -> list[str]:
    """The names of all claims."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_claim(name: str, size: str = "nano") -> Claim:
    """Read a claim's definition. Raises MythosError for an unknown claim or size, and for an invalid definition."""
    names = claim_names()
    if name not in names:
        raise MythosError(f"{name}: unknown claim; {suggestion(name, names)} (`mythos claims list` lists all)")
    if size not in SIZES:
        raise MythosError(f"--size: got {size}; allowed: {', '.join(SIZES)}")
    path = FOLDER / f"{name}.yaml"
    problems = Problems(str(path), ClaimSection)
    values = read_yaml(path, problems)
    _check_plain(values, problems)
    problems.raise_any()
    try:
        definition = ClaimSection.model_validate(values)
    except ValidationError as error:
        for one in error.errors():
            problems.add(".".join(map(str, one["loc"])), one["msg"])
        problems.raise_any()
        raise
    _check_grids(definition, problems)
    problems.raise_any()
    if size not in definition.sizes:
        raise MythosError(f"--size: got {size}; {name} has {', '.join(definition.sizes)}")
    return Claim(name, next(known for known in definition.sizes if known == size), definition)
