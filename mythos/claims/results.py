"""The results of a claim: facts and measurements of its runs, in one JSON file from which its verdict is computed."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from mythos.claims.definition import ENOUGH_SEEDS, Claim, Overrides, place_name, points, run_name
from mythos.errors import MythosError, short_reason
from mythos.files.local import write_whole, writing
from mythos.files.text import from_plain, read_json

Key = TypeVar("Key")
Item = TypeVar("Item")

FOLDER = Path("results/claims")
FILE = "results.json"
EMBEDDED = "embedded"
"""`data` of results whose text is that of the claim's base."""


@dataclass(frozen=True)
class RunResult:
    """What is kept of a run."""

    arm: str
    point: Overrides
    """Values of grid and tuning grid."""
    seed: int
    parameters: int
    tokens: int
    """Training tokens."""
    flops: float
    """FLOPs of the training: matmuls, by the depths that were run."""
    core_flops: float
    """Those of `flops` in the loops of the core."""
    mean_loops: int
    """Loops at which `val/loss` is measured."""
    seconds: float
    """Time of the training steps."""
    diverged: int | None
    """Step at which training ended because it had diverged; None for a finished run."""
    skipped: int
    """Updates that were skipped, because loss or gradient were not finite."""
    largest: dict[str, float | None]
    """Largest values of rho_a, state_norm and grad_norm in the records; None for one that is not finite."""
    validations: list[dict[str, Any]]
    """Records with a validation, without times."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Results of the claim's measurements, by kind."""

    @property
    def name(self) -> str:
        """The run's name in its claim and size."""
        return run_name(self.arm, self.point, self.seed)

    @property
    def swept(self) -> dict[int, float]:
        """Loss by number of loops of the measured sweep, at the depths that it has read out."""
        return {one["loops"]: one["loss"] for one in self.measured["sweep"]["loops"] if one["loss"] is not None}

    def last(self, key: str) -> float:
        """A value of the last validation; NaN if the run has none."""
        value = self.validations[-1].get(key) if self.validations else None
        return math.nan if value is None else float(value)


@dataclass
class Results:
    """All results of a claim at one size, on one text."""

    claim: str
    size: str
    config: str
    """Hash of the claim's definition when the runs were started."""
    data: str
    """`embedded`, or the path of --data."""
    versions: dict[str, str]
    once: dict[str, Any] = field(default_factory=dict)
    """Measurements that need no run."""
    runs: dict[str, RunResult] = field(default_factory=dict)

    def of_arm(self, arm: str) -> list[RunResult]:
        """The runs of an arm."""
        return [run for run in self.runs.values() if run.arm == arm]

    def finished(self, arm: str) -> list[RunResult]:
        """The runs of an arm that did not diverge."""
        return [run for run in self.of_arm(arm) if run.diverged is None]

    def seeds(self, claim: Claim) -> int:
        """Number of seeds that every arm and grid point has; 0 if one has no run at all."""
        places = [place_name(arm, point) for arm in claim.arms for point in points(claim.grid)]
        seeds = grouped((claim.place_of(run.arm, run.point), run.seed) for run in self.chosen(claim))
        return min((len(set(seeds.get(place, ()))) for place in places), default=ENOUGH_SEEDS)

    def best(self, claim: Claim) -> dict[str, Overrides]:
        """Values of the tuning grid with the lowest validation loss of seed 0, by arm and grid point.

        A place whose values have not all been run with seed 0 is left out.
        """
        if not claim.tune:
            return {}
        values = math.prod(map(len, claim.tune.values()))
        tuned = grouped((claim.place_of(run.arm, run.point), run) for run in self.runs.values() if run.seed == 0)
        return {
            place: {path: min(runs, key=final_loss).point[path] for path in claim.tune}
            for place, runs in tuned.items()
            if len(runs) == values
        }

    def chosen(self, claim: Claim) -> Iterator[RunResult]:
        """The runs that are compared: of a tuned arm those at its best values only."""
        best = self.best(claim)
        for run in self.runs.values():
            values = best.get(claim.place_of(run.arm, run.point), {})
            if all(run.point[path] == value for path, value in values.items()):
                yield run

    def dump(self) -> str:
        """The file's content: JSON with one line for each run."""
        head = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("runs", "once")}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        lines.append(f' "once": {json.dumps(rounded(self.once))},')
        runs = [f"  {json.dumps(rounded(asdict(run)), allow_nan=False)}" for run in self.runs.values()]
        return "\n".join(["{", *lines, ' "runs": [', ",\n".join(runs), " ]", "}"]) + "\n"

    def digest(self) -> str:
        """Hash of the file's content."""
        return hashlib.blake2b(self.dump().encode(), digest_size=8).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the file. Raises MythosError if it cannot be written."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / FILE, self.dump())


def grouped(pairs: Iterable[tuple[Key, Item]]) -> dict[Key, list[Item]]:
    """The second items of pairs by their first, in their order."""
    groups: dict[Key, list[Item]] = {}
    for key, item in pairs:
        groups.setdefault(key, []).append(item)
    return groups


def final_loss(run: RunResult) -> float:
    """Validation loss at the end, nats per token; infinite for a run that diverged."""
    loss = run.last("val/loss")
    return math.inf if run.diverged is not None or math.isnan(loss) else loss


def read_results(folder: Path) -> Results | None:
    """Read a claim's results; None if there are none. Raises MythosError for a file that `write` did not write."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        from_plain(list[RunResult], content["runs"])  # checks the types
        runs = [RunResult(**run) for run in content.pop("runs")]
        results = Results(**content, runs={run.name: run for run in runs})
        from_plain(Results, asdict(results))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MythosError(f"{path} cannot be read as results of a claim: {short_reason(error)}") from error
    return results


def rounded(value: Any) -> Any:
    """Floats with 6 significant digits, those that are not finite as null, in lists and mappings."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
