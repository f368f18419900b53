"""Collect what a claim keeps of a finished run: facts from its files, and measurements of its model."""

from typing import Any

from mythos.claims.costs import run_flops
from mythos.claims.definition import Claim, PlannedRun
from mythos.claims.measures import measure_run
from mythos.claims.results import RunResult, rounded
from mythos.planning.budget import sized
from mythos.planning.flops import count_parameters, forward_flops
from mythos.reports.recorded import RecordedRun, open_run
from mythos.training.metrics import METRICS_FILE, read_metrics

LARGEST = ("rho_a", "state_norm", "grad_norm")
TIMES = ("time", "tokens_per_second", "mfu", "resumed_from", "own_seconds", "peak_memory_bytes", "rollbacks", "lr")
"""Keys of records that are left out of the validations."""


def is_finished(planned: PlannedRun) -> bool:
    """Whether the run has trained to its end and its last validation is recorded."""
    records = read_metrics(planned.config.run_dir / METRICS_FILE)
    return any(record["step"] == planned.config.train_steps and "val/loss" in record for record in records[-2:])


def collect(claim: Claim, planned: PlannedRun, diverged: int | None = None) -> RunResult:
    """Facts and measurements of a run that has ended; one that diverged at step `diverged` is not measured."""
    if diverged is not None:
        return collect_diverged(planned, diverged)
    recorded = open_run(planned.config.run_dir)
    model = recorded.config.model
    return RunResult(
        arm=planned.arm,
        point=planned.point,
        seed=planned.seed,
        parameters=count_parameters(model).total,
        tokens=recorded.last("tokens"),
        flops=rounded(recorded.flops[-1]),
        core_flops=rounded(core_flops(recorded)),
        mean_loops=1 if model.injection == "none" else round(recorded.config.depth_mean),
        seconds=rounded(training_seconds(recorded.records)),
        diverged=None,
        skipped=recorded.last("skipped_steps") or 0,
        largest=rounded(largest_values(recorded)),
        validations=[
            rounded({key: value for key, value in record.items() if key not in TIMES and not key.startswith("data/")})
            for record in recorded.validations
        ],
        measured=rounded(measure_run(planned.config.run_dir, claim.measure)),
    )


def collect_diverged(planned: PlannedRun, step: int) -> RunResult:
    """Facts of a run that diverged at a step: of its records there may be none."""
    config = planned.config
    run = RecordedRun(config.run_dir, config, read_metrics(config.run_dir / METRICS_FILE))
    return RunResult(
        arm=planned.arm,
        point=planned.point,
        seed=planned.seed,
        parameters=count_parameters(sized(config).model).total,
        tokens=step * config.tokens_per_step,
        flops=rounded(step / config.train_steps * run_flops(config)),
        core_flops=0.0,
        mean_loops=round(config.depth_mean),
        seconds=rounded(training_seconds(run.records)),
        diverged=step,
        skipped=config.train.skip_limit,
        largest=rounded(largest_values(run)),
        validations=[],
    )


def largest_values(run: RecordedRun) -> dict[str, float]:
    """The largest value of each of `LARGEST` that was recorded."""
    return {key: max(values) for key in LARGEST if (values := run.measured(key))}


def core_flops(run: RecordedRun) -> float:
    """FLOPs of the training in the loops of the core; steps between two records count at the later one's depths."""
    costs = forward_flops(run.config.model, run.config.data.sequence_length)
    total, before = 0.0, 0
    for record in run.records:
        if "loops" in record:
            tokens = record["tokens"] - before
            total += tokens * (costs.training_at(record["loops"], record["backprop_loops"]) - 3 * costs.once)
        before = record["tokens"]
    return total


def training_seconds(records: list[dict[str, Any]]) -> float:
    """Time of the training steps, from the recorded throughput."""
    seconds, before = 0.0, 0
    for record in records:
        if record.get("tokens_per_second"):
            seconds += (record["tokens"] - before) / record["tokens_per_second"]
        before = record["tokens"]
    return seconds
