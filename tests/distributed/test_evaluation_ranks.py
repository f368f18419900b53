"""Questions and text scored by several processes: the numbers of one."""

import json
from pathlib import Path
from typing import Any

import pytest

from mythos.cli import main
from mythos.trainer import Trainer
from tests.cli.test_evaluate import questions
from tests.distributed.pool import RankPool
from tests.evaluation.local_tasks import write_tasks
from tests.runs import tiny
from tests.trainers import take_step

OPTIONS = ["--loops", "1,4,auto", "--exit-threshold", "0.3", "--micro-batch", "2"]


def train(directory: Path, mode: str) -> dict[str, float]:
    """Three steps, and what validation then finds."""
    tasks = [str(directory / "local.jsonl")]
    trainer = Trainer(
        tiny(directory, run__dir=str(directory / mode), parallel__mode=mode, eval__tasks=tasks, optim__lr=0.02)
    )
    for _ in range(3):
        take_step(trainer)
    metrics = trainer.validate()
    trainer.save(wait=True)
    trainer.resources.close()
    return {key: value for key, value in metrics.items() if "local" in key}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    directory = tmp_path_factory.mktemp("questions")
    questions(directory)
    return directory, train(directory, "single")


def test_a_sharded_model_in_training(pool: RankPool, single: tuple[Path, dict[str, float]]) -> None:
    directory, metrics = single
    assert len(metrics) == 4
    assert pool.run(train, directory, "fsdp", ranks=2) == [metrics, metrics]


def test_the_script(pool: RankPool, single: tuple[Path, dict[str, float]]) -> None:
    directory, _ = single
    values: list[Any] = []
    for ranks in (1, 2):
        out = directory / f"out-{ranks}"
        arguments = ["evaluate", str(directory / "single"), "--tasks", str(directory / "local.jsonl"), "--data"]
        arguments += [str(directory / "corpus.jsonl"), "--limit", "7", "--out", str(out), *OPTIONS]
        statuses = pool.run(main, arguments, ranks=ranks) if ranks > 1 else [main(arguments)]
        assert statuses == [0] * ranks
        values.append(json.loads(next(out.glob("step-00000003_*.json")).read_text())["results"])
    assert len(values[0]) == 12
    for one, two in zip(*values, strict=True):
        assert {**one, "value": 0, "mean_loops": 0} == {**two, "value": 0, "mean_loops": 0}
        assert two["value"] == pytest.approx(one["value"], rel=1e-5)
        assert two["mean_loops"] == pytest.approx(one["mean_loops"], rel=1e-6)


def test_tasks_of_the_harness(pool: RankPool, single: tuple[Path, dict[str, float]]) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    directory, _ = single
    write_tasks(directory / "tasks", directory / "local.jsonl")
    values = []
    for ranks in (1, 2):
        out = directory / f"harness-{ranks}"
        arguments = [
            "evaluate",
            str(directory / "single"),
            "--tasks",
            "local_multiple_choice,local_generate_until",
            "--include-path",
        ]
        arguments += [str(directory / "tasks"), "--out", str(out), *OPTIONS]
        statuses = pool.run(main, arguments, ranks=ranks) if ranks > 1 else [main(arguments)]
        assert statuses == [0] * ranks
        values.append(json.loads(next(out.glob("step-00000003_*.json")).read_text())["results"])
    assert len(values[0]) == 9
    for one, two in zip(*values, strict=True):
        assert two == {**one, "mean_loops": pytest.approx(one["mean_loops"], rel=1e-6)}


def test_all_ranks_report_what_cannot_be_scored(pool: RankPool, single: tuple[Path, dict[str, float]]) -> None:
    directory, _ = single
    arguments = ["evaluate", str(directory / "single"), "--tasks", "nothing.jsonl"]
    assert pool.run(main, arguments, ranks=2) == [1, 1]
