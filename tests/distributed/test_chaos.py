"""Training ends up the same whatever happens on the way, and the comparison that says so finds what differs."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mythos.trainer import Trainer
from scripts import chaos_run, chaos_test
from scripts.chaos_run import RENAMED, TMP, TRAINING, Failed, Run
from scripts.chaos_test import FAULTS_OF_A_RUN, KINDS, RANK, Chaos, Fault, Layout, deck, disturb, draw_faults
from tests.runs import tiny
from tests.warm import WarmPopen


def test_faults_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_test, "STEPS_AFTER", 9)
    monkeypatch.setattr(chaos_run.subprocess, "Popen", WarmPopen)  # of the undisturbed run; torchrun starts the others
    faults = [
        Fault("NaN", TRAINING, RANK, rank=1, step=7),
        Fault("killed between shards and marker", RENAMED, RANK, rank=0, step=9),
        Fault("flipped byte", TRAINING, RANK, rank=0, step=16),
        Fault("SIGTERM", TMP, RANK, rank=1, step=21),
    ]
    chaos = disturb(tmp_path, "short", Layout("ddp", 2), faults, random.Random(0), mount=False)
    _, killed, flipped, terminated = chaos.outcomes
    assert killed.met == RENAMED
    assert killed.lost > 0 and flipped.lost > 0 and terminated.lost == 0
    assert chaos.compared >= 6  # of the checkpoints of steps 5, 10, 15, 20, 21, 25 and 30


def test_draws() -> None:
    """Every kind as often, in order of steps, and again the same from the same seed."""
    draws = []
    for _ in range(2):
        draw = random.Random(3)
        kinds = deck(draw, list(KINDS))
        draws.append([draw_faults(draw, kinds, FAULTS_OF_A_RUN, processes) for processes in (2, 2, 4, 4)])
    assert draws[0] == draws[1]
    assert {[fault.kind for faults in draws[0] for fault in faults].count(kind) for kind in KINDS} == {5}
    for faults in draws[0]:
        steps = [fault.step for fault in faults]
        assert steps == sorted(set(steps))
    assert {fault.rank for faults in draws[0][2:] for fault in faults} == {0, 1, 2, 3}


# A run and its reference that are equal, to be spoiled


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"train__steps": 6, "checkpoint__every": 2, "checkpoint__keep": 3}
    Trainer(tiny(folder, **changes)).run()
    return folder / "run"


@pytest.fixture
def chaos(trained: Path, tmp_path: Path) -> Chaos:
    """Two equal runs, after a first look at one of them."""
    runs = []
    for name in ("reference", "disturbed"):
        runs.append(Run(tmp_path / name, {}, 1, {}))
        shutil.copytree(trained, runs[-1].directory, dirs_exist_ok=True)
    chaos = Chaos(runs[1], runs[0], random.Random(0), mounted=False)
    chaos.look()
    assert (chaos.newest, chaos.known, chaos.compared) == (6, {2, 4, 6}, 3)
    return chaos


def shard_of(chaos: Chaos, step: int) -> Path:
    (shard,) = (chaos.run.checkpoints / f"step-{step:08d}").glob("shard-*")
    return shard


def recommit(checkpoint: Path, change: Callable[[dict], None]) -> None:
    """Change meta.json and let all checksums be right."""
    meta = json.loads((checkpoint / "meta.json").read_text())
    change(meta)
    for file in meta["files"]:
        content = (checkpoint / file).read_bytes()
        meta["files"][file] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    text = json.dumps(meta).encode()
    (checkpoint / "meta.json").write_bytes(text)
    (checkpoint / "committed").write_text(json.dumps({"meta_crc32": zlib.crc32(text)}))


def least_bit(chaos: Chaos) -> None:
    shard = shard_of(chaos, 4)
    tensors = load_file(shard)
    tensors["optim.embedding.weight.exp_avg"].view(np.uint32)[5, 3] ^= 1
    save_file(tensors, shard)
    recommit(shard.parent, lambda meta: None)


def data_position(chaos: Chaos) -> None:
    def change(meta: dict) -> None:
        (position,) = meta["data"]["positions"]["1"].values()
        position[3] += 1

    recommit(shard_of(chaos, 6).parent, change)


def flipped_byte(chaos: Chaos) -> None:
    content = bytearray(shard_of(chaos, 2).read_bytes())
    content[-1] ^= 1
    shard_of(chaos, 2).write_bytes(content)


def lost_checkpoint(chaos: Chaos) -> None:
    (shard_of(chaos, 2).parent / "committed").unlink()


def records(change: Callable[[list[str]], list[str]]) -> Callable[[Chaos], None]:
    def spoil(chaos: Chaos) -> None:
        path = chaos.run.directory / "metrics.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return spoil


def another_loss(lines: list[str]) -> list[str]:
    record = json.loads(lines[2])
    record["loss"] = float(np.nextafter(record["loss"], 9))
    return [*lines[:2], json.dumps(record) + "\n", *lines[3:]]


def continued(step: int) -> Callable[[Chaos], None]:
    def spoil(chaos: Chaos) -> None:
        (chaos.run.folder / "events-0").write_text(f"{time.monotonic()} 1 continued {step}\n")

    return spoil


def unreported_damage(chaos: Chaos) -> None:
    chaos.flip()
    continued(4)(chaos)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (least_bit, r"^step 4: tensor optim.embedding.weight.exp_avg \(shard-"),
        (data_position, "^step 6: data differs"),
        (flipped_byte, "^the committed checkpoint of step 2 is damaged: shard-"),
        (lost_checkpoint, "^the committed checkpoint of step 2 is lost"),
        (records(lambda lines: lines[:3] + lines[2:]), r"has the steps \[1, 2, 3, 3, 4, 5, 6\]"),
        (records(lambda lines: lines[:3] + lines[4:]), r"has the steps \[1, 2, 3, 5, 6\]"),
        (records(another_loss), "^step 3: metrics.jsonl differs from the undisturbed run's: loss: "),
        (continued(4), "^rank 0 continued from step 4, not 6"),
        (unreported_damage, "step-00000006 is damaged, which was not reported"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_comparison_finds(spoil: Callable[[Chaos], None], message: str, chaos: Chaos) -> None:
    spoil(chaos)
    with pytest.raises(Failed, match=message):
        chaos.look()


def test_an_interrupted_validation_is_missing_only_until_the_run_ends(chaos: Chaos) -> None:
    """A signal during the last validation: the checkpoint has the record, and the next start completes it."""
    unfinished = json.loads((shard_of(chaos, 6).parent / "meta.json").read_text())["record"]
    records(lambda lines: [*lines[:-1], json.dumps(unfinished) + "\n"])(chaos)
    chaos.look()
    with pytest.raises(Failed, match=r"^step 6: metrics.jsonl differs .* val/loss: None, "):
        chaos.look(ended=True)
    records(lambda lines: [*lines[:-1], json.dumps(unfinished | {"loss": 0.0}) + "\n"])(chaos)
    with pytest.raises(Failed, match=r"^step 6: metrics.jsonl differs .* loss: 0.0, "):
        chaos.look()


def test_a_leftover_process_is_detected(chaos: Chaos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_run, "GONE_SECONDS", 0.3)
    chaos.run.wait_gone()
    command = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
    environment = {**os.environ, chaos_run.FOLDER: str(chaos.run.folder)}
    left = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE)
    try:
        left.stdout.readline()  # while a process is being started it has no environment to be found by
        with pytest.raises(Failed, match=f"left after 0 s:\n{left.pid}: "):
            chaos.run.wait_gone()
        chaos.run.destroy()
        assert left.wait(5) == -9
    finally:
        left.kill()
