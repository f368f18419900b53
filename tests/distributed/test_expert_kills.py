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
    first, second, third = relay(tmp_path, generations, steps=8)
    assert first == 0 and 2 <= second < third < 8


def test_draws() -> None:
    """No layout twice in a row, the last one is not killed, and again the same from the same seed."""
    generations = draw_generations(random.Random(1), 30)
    assert generations == draw_generations(random.Random(1), 30)
    assert [generation.steps is None for generation in generations] == [False] * 30 + [True]
    assert all(one[:5] != other[:5] for one, other in itertools.pairwise(generations))
    assert {generation.expert for generation in generations} == {1, 2, 4}


def test_another_loss_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes: records of both runs are written here."""

    def live(config: Path, run: Path, generation: Generation, log: Path) -> None:
        run.mkdir(exist_ok=True)
        loss = 5.0 if run.name == "reference" else 5.001
        lines = [f'{{"step": {step}, "loss": {loss if step == 2 else 5.0}}}\n' for step in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(lines))

    monkeypatch.setattr(expert_kill_test, "live", live)
    with pytest.raises(Failed, match=r"step 2: loss 5.001, in one process 5.0"):
        relay(tmp_path, [Generation(1, "single", 1)], steps=2)
    with pytest.raises(Failed, match="recorded steps"):
        relay(tmp_path, [Generation(1, "single", 1)], steps=3)
