"""A run that is killed, and continues with another parallel.expert, ends as one that was never stopped."""

import itertools
import random
from pathlib import Path

import pytest

from scripts import chaos_run, expert_kill_test
from scripts.chaos_run import Failed
from scripts.expert_kill_test import Generation, draw_generations, relay
from tests.warm import WarmPopen


def test_killed_runs_continue_with_other_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two processes that share the experts is killed, then both of two that do not; one process ends the run."""
    monkeypatch.setattr(chaos_run.subprocess, "Popen", WarmPopen)
    generations = [
        Generation(2, "fsdp", 2, shared=2, steps=2),
        Generation(2, "fsdp", 1, steps=1, victims=2),
        Generation(1, "single", 1),
    ]
    (first, second, third), largest, rounding = relay(tmp_path, generations, steps=8)
    assert 0 < largest < 1e-6 and 0 < rounding < 1e-6  # in so few steps; TOLERANCE is for many
    assert first == 0 and 2 <= second < third < 8


def test_draws() -> None:
    """No layout twice in a row, the last one is not killed, and again the same from the same seed."""
    generations = draw_generations(random.Random(1), 30)
    assert generations == draw_generations(random.Random(1), 30)
    assert [generation.steps is None for generation in generations] == [False] * 30 + [True]
    assert all(one[:5] != other[:5] for one, other in itertools.pairwise(generations))
    assert {generation.expert for generation in generations} == {1, 2, 4}


@pytest.mark.parametrize(("rounded", "steps"), [((5.0, 5.0, 5.0), 2), ((5.0, 5.0, 5.002), 2), ((5.0, 5.0002, 5.0), 3)])
def test_another_loss_is_found(
    rounded: tuple[float, ...], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without processes, of written records: rounding excuses neither before it happens nor more than twice itself."""
    losses = {"reference": (5.0, 5.0, 5.0), "rounding": rounded, "relay": (5.0, 5.001, 5.001)}
    if steps == 3:  # step 2 is excused by ROUNDING, step 3 is not
        losses["relay"] = (5.0, 5.0003, 5.0006)

    def live(config: Path, run: Path, generation: Generation, log: Path) -> None:
        run.mkdir(exist_ok=True)
        lines = [f'{{"step": {step}, "loss": {loss}}}\n' for step, loss in enumerate(losses[run.name], start=1)]
        (run / "metrics.jsonl").write_text("".join(lines))

    monkeypatch.setattr(expert_kill_test, "live", live)
    with pytest.raises(Failed, match=rf"step {steps}: loss {losses['relay'][steps - 1]}, in one process 5.0"):
        relay(tmp_path, [Generation(1, "single", 1)], steps=3)
    with pytest.raises(Failed, match="recorded steps"):
        relay(tmp_path, [Generation(1, "single", 1)], steps=4)


def test_rounding_excuses_as_much_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another size of micro-batches does to one process, twice over."""
    losses = {"reference": 5.0, "rounding": 5.001, "relay": 4.9981}

    def live(config: Path, run: Path, generation: Generation, log: Path) -> None:
        run.mkdir(exist_ok=True)
        (run / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {losses[run.name]}}}\n')

    monkeypatch.setattr(expert_kill_test, "live", live)
    continued, largest, rounding = relay(tmp_path, [Generation(1, "single", 1)], steps=1)
    assert continued == [0]
    assert largest == pytest.approx(3.8e-4) and rounding == pytest.approx(2e-4)
