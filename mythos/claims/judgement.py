"""Verdicts: outcome, number, and the tables that show how they came out."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mythos.claims.definition import ENOUGH_SEEDS, Claim
from mythos.claims.results import Results
from mythos.errors import MythosError, short_reason

if TYPE_CHECKING:
    from mythos.reports.style import Panel

SUPPORTED, CONDITIONS, NOT_SUPPORTED = "supported", "supported under conditions", "not supported"
UNDECIDED, NOT_RUN = "undecided", "not run"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


@dataclass(frozen=True)
class Table:
    """A table of a verdict."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table as Markdown, below its title."""
        return f"**{self.title}**\n\n{markdown(self.head, self.rows)}"


@dataclass(frozen=True)
class Judgement:
    """What the runs of a claim show."""

    outcome: str
    number: str
    """The deciding figure in a few words."""
    why: str
    """One or two sentences."""
    tables: Sequence[Table] = field(default_factory=list)


def judge(claim: Claim, results: Results) -> Judgement:
    """The verdict, computed from the results alone. Undecided with fewer than three seeds, or with an arm missing.

    Raises MythosError for results that lack what the verdict is computed from.
    """
    with _readable(claim):
        return _judge(claim, results)


def _judge(claim: Claim, results: Results) -> Judgement:
    seeds = results.seeds(claim)
    if seeds == 0:
        missing = sorted(claim.arms.keys() - {run.arm for run in results.runs.values()})
        what = f"no run of {', '.join(missing)} yet" if missing else "runs of a grid are missing"
        return Judgement(UNDECIDED, f"{len(results.runs)} runs so far", f"{what}.")
    judgement: Judgement = module_of(claim.name, "judge")(claim, results)
    if seeds < ENOUGH_SEEDS:
        why = f"{seeds} of the {ENOUGH_SEEDS} seeds that a verdict needs. So far: {judgement.outcome}. {judgement.why}"
        return replace(judgement, outcome=UNDECIDED, why=why)
    return judgement


def panels(claim: Claim, results: Results) -> "list[Panel]":
    """The plots of the claim's picture. Raises as :func:`judge`."""
    with _readable(claim):
        drawn: list[Panel] = module_of(claim.name, "panels")(claim, results)
    return drawn


@contextmanager
def _readable(claim: Claim) -> Iterator[None]:
    """Raise MythosError for values that are missing in the results, or are of another kind: an edited file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration, RuntimeError) as error:
        cause = f"{type(error).__name__}: {short_reason(error)}"
        raise MythosError(
            f"{claim.name}: no verdict can be computed from its results ({cause}). Restore results.json from a copy, "
            "or delete it to run the claim anew."
        ) from error


def module_of(name: str, function: str) -> Callable[..., Any]:
    """A function of the module that judges a claim. Raises MythosError if there is no such module."""
    module = name.replace("-", "_")
    try:
        found: Callable[..., Any] = getattr(import_module(f"mythos.claims.judges.{module}"), function)
    except ModuleNotFoundError as error:
        raise MythosError(f"{name}: a claim needs mythos/claims/judges/{module}.py with judge and panels") from error
    return found


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of none."""
    return statistics.fmean(values) if values else math.nan


def upper_bound(values: Sequence[float]) -> float:
    """The mean plus the range over seeds: what is above it differs."""
    return mean(values) + max(values) - min(values)


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and range over seeds as text, e.g. `3.142 (3.100 to 3.180)`; a single value alone."""
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        bad = sum(not math.isfinite(value) for value in values)
        return f"{bad} of {len(values)} not finite"
    text = format(mean(values), form)
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"
