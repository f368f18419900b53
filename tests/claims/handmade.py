"""Results of claims written by hand."""

from typing import Any

from mythos.claims.definition import Claim, load_claim, points, run_name
from mythos.claims.results import Results, RunResult


def run(arm: str, seed: int, point: dict[str, Any] | None = None, loss: float = 3.0, **changes: Any) -> RunResult:
    """A finished run of 4 mean loops with this validation loss at every depth."""
    values: dict[str, Any] = {
        "arm": arm,
        "point": point or {},
        "seed": seed,
        "parameters": 1000,
        "tokens": 10_000,
        "flops": 1e9,
        "core_flops": 5e8,
        "mean_loops": 4,
        "seconds": 1.0,
        "diverged": None,
        "skipped": 0,
        "largest": {},
        "validations": [{"step": 10, "val/loss": loss, **{f"val/loss@{n}": loss for n in (1, 4, 8, 16, 32)}}],
        "measured": {},
    }
    return RunResult(**values | changes)


def results(claim: Claim, runs: list[RunResult], once: dict[str, Any] | None = None) -> Results:
    """Results of these runs."""
    by_name = {run_name(one.arm, one.point, one.seed): one for one in runs}
    return Results(claim.name, claim.size, claim.digest(), "embedded", {"torch": "0"}, once or {}, by_name)


def all_runs(claim: Claim, make: Any, seeds: int = 3) -> list[RunResult]:
    """`make(arm, seed, point)` for every arm, grid point and seed of a claim."""
    return [make(arm, seed, point) for arm in claim.arms for point in points(claim.grid) for seed in range(seeds)]


def loaded(name: str) -> Claim:
    return load_claim(name)
