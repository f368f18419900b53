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
    """Facts and measurements of a run that has ended.

    One that diverged at step `diverged` is not measured, and may have no records.
    """
    config = planned.config
    if diverged is None:
        run = open_run(config.run_dir)
        tokens, flops, in_core = run.last("tokens"), run.flops[-1], core_flops(run)
        skipped, validations = run.last("skipped_steps") or 0, run.validations
        measured = measure_run(config.run_dir, claim.measure)
    else:
        run = RecordedRun(config.run_dir, config, read_metrics(config.run_dir / METRICS_FILE))
        flops, in_core = diverged / config.train_steps * run_flops(config), 0.0
        tokens, skipped, validations, measured = diverged * config.tokens_per_step, config.train.skip_limit, [], {}
    model = sized(run.config).model
    return RunResult(
        arm=planned.arm,
        point=planned.point,
        seed=planned.seed,
        parameters=count_parameters(model).total,
        tokens=tokens,
        flops=rounded(flops),
        core_flops=rounded(in_core),
        mean_loops=1 if model.injection == "none" else round(run.config.depth_mean),
        seconds=rounded(training_seconds(run.records)),
        diverged=diverged,
        skipped=skipped,
        largest=rounded(largest_values(run)),
        validations=[
            rounded({key: value for key, value in record.items() if key not in TIMES and not key.startswith("data/")})
            for record in validations
        ],
        measured=rounded(measured),
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
