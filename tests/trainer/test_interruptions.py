"""Training that is spoilt, stopped, killed and continued."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mythos.checkpoints.stored_checkpoint import complete_checkpoints
from mythos.config.loading import load_config
from mythos.config.sections import Config
from mythos.data.pipeline import open_data
from mythos.data.stream import Batch
from mythos.errors import MythosError
from mythos.trainer import StepResult, Trainer
from tests.runs import documents, losses, measurements, tiny, write_settings
from tests.trainers import assert_identical, fail_at, run, saved, state_of, take_step
from tests.warm import WarmPopen

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("no_plots")

# --- updates that are skipped


def spoil(trainer: Trainer, steps: set[int]) -> None:
    """Make the loss of these steps (counted from 0) NaN, and with it every gradient."""
    forward = trainer.forward

    def spoilt(*inputs):
        output = forward(*inputs)
        return output._replace(loss=output.loss * math.nan) if trainer.step in steps else output

    trainer.forward = spoilt


def test_diverged_run_stops_and_saves_nothing_spoilt(tmp_path):
    """Unlogged steps too: a checkpoint of a diverged model would replace the one to go back to."""
    trainer = Trainer(tiny(tmp_path, log__every=100, checkpoint__every=2, train__steps=8))
    spoil(trainer, {3, 4, 5, 6, 7})
    with pytest.raises(MythosError, match=r"the loss is nan.*at step 8.*diverged.*5 updates in a row.*step-00000002"):
        trainer.run()
    assert complete_checkpoints(trainer.run_dir / "checkpoints") == [saved(trainer, 2)]


def test_skipped_update_leaves_everything_as_it_was(tmp_path):
    """Weights, moments, step counts and router biases; the run goes on and counts it."""
    trainer = Trainer(tiny(tmp_path, train__steps=6, model__router_bias_rate=0.25))
    spoil(trainer, {2, 3})
    for _ in range(2):
        take_step(trainer)
    before = {name: tensor.clone() for name, tensor in state_of(trainer).items()}
    for _ in range(2):
        take_step(trainer)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(trainer).items())
    result = take_step(trainer)
    assert not torch.equal(trainer.model.embedding.weight, before["model.embedding.weight"])
    assert trainer.measure(result)["skipped_steps"] == 2


def test_spoilt_steps_are_records_without_a_loss(tmp_path):
    trainer = Trainer(tiny(tmp_path, train__steps=6))
    spoil(trainer, {2})
    trainer.run()
    records = measurements(trainer.run_dir)
    assert [record["loss"] is None for record in records] == [False, False, True, False, False, False]
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 1, 1]
    assert json.loads((saved(trainer, 6) / "meta.json").read_text())["skips"]["total"] == 1


def test_finished_run_that_is_extended_goes_on_with_new_data(tmp_path):
    """The last checkpoint is at the end of its data, like any other."""
    changes = {"depth__curriculum__shape": "none", "optim__schedule": "wsd", "optim__min_lr": 1.0}
    changes |= {"optim__warmup": 0.0}
    run(tiny(tmp_path, train__steps=3, **changes))
    extended = run(tiny(tmp_path, train__steps=6, **changes))
    whole = run(tiny(tmp_path, train__steps=6, **changes, run__dir=str(tmp_path / "whole")))
    assert losses(extended.run_dir) == losses(whole.run_dir)
    assert_identical(whole, extended)


def test_skips_and_random_generators_continue(tmp_path):
    trainer = Trainer(tiny(tmp_path, train__steps=6, checkpoint__every=2, train__skip_limit=3))
    spoil(trainer, {2, 5})
    at = trainer.train_step
    trainer.train_step = lambda batch: (torch.rand(7), at(batch))[1]
    with contextlib.suppress(MythosError):
        trainer.run()  # which ends with a skipped update
    drawn = torch.rand(7)
    continued = Trainer(tiny(tmp_path, train__steps=6, checkpoint__every=2, train__skip_limit=3))
    assert continued.step == 4 and int(continued.skipped) == 1
    for _ in range(2):
        torch.rand(7)
    assert torch.equal(torch.rand(7), drawn)


def test_rollback_goes_on_with_the_data_that_comes_next(tmp_path):
    """Weights and moments are the checkpoint's again; steps, schedule and data go on."""
    changes = {"train__steps": 9, "train__skip_limit": 2, "train__rollbacks": 1, "checkpoint__every": 2}
    trainer = Trainer(tiny(tmp_path, **changes))
    spoil(trainer, {3, 4})
    trainer.run()
    other = Trainer(tiny(tmp_path, **changes, run__dir=str(tmp_path / "other")))
    for step in range(9):
        batch, _ = other.read_ahead()
        if step not in (2, 3, 4):  # undone, and skipped
            other.train_step(batch)
        other.step += 1
    assert_identical(other, trainer)


# --- interruptions

EVERYTHING = {
    "train__steps": 9,
    "train__micro_batch": 4,
    "eval__every": 2,
    "eval__samples": 1,
    "checkpoint__every": 3,
    "data__mask_documents": True,
    "depth__backprop_curriculum": {"shape": "steps", "over": 0.6, "start": 1},
}
"""Curriculum, routed experts, accumulation, validation in between."""


class Interrupted(Exception):
    pass


def interrupt(config: Config, step: int) -> None:
    """Train until `step` is done, then lose everything that is not on disk."""
    trainer = Trainer(config)
    original = trainer.train_step

    def until(batch: Batch) -> StepResult:
        if trainer.step == step:
            raise Interrupted
        return original(batch)

    trainer.train_step = until
    with pytest.raises(Interrupted):
        trainer.run()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Trainer:
    return run(tiny(tmp_path_factory.mktemp("uninterrupted"), **EVERYTHING))


@pytest.mark.parametrize("stop", [2, 3, 8])
def test_resume_is_exact(tmp_path, uninterrupted, stop):
    """Before the first checkpoint, right after one, and after unsaved steps whose records are already on disk."""
    config = tiny(tmp_path, **EVERYTHING)
    interrupt(config, stop)
    assert len(measurements(config.run_dir)) == stop
    continued = run(config)
    assert measurements(config.run_dir) == measurements(uninterrupted.run_dir)
    assert_identical(uninterrupted, continued)


def test_resume_of_a_model_that_repeats_layer_by_layer_is_exact(tmp_path):
    layers = {"model__core_layers": 2, "model__loop_over": "layer", "model__injection": "orthogonal"}
    changes = EVERYTHING | layers
    config = tiny(tmp_path, **changes)
    interrupt(config, 3)
    continued = run(config)
    whole = run(tiny(tmp_path, run__dir=str(tmp_path / "whole"), **changes))
    assert measurements(config.run_dir) == measurements(whole.run_dir)
    assert_identical(whole, continued)


def test_resume_is_exact_with_passes_that_differ(tmp_path):
    """Tables with a row per loop, a router's bias for each loop, and two state lanes."""
    changes = {"model__router_loop": "embedding", "model__router_bias_per_loop": True, "model__loop_norm": "adaptive"}
    changes |= {"model__residual_scale": 0.3, "optim__name": "muon", "train__steps": 6, "checkpoint__every": 3}
    changes |= {"model__lanes": 2}
    whole = run(tiny(tmp_path, **changes, run__dir=str(tmp_path / "whole")))
    config = tiny(tmp_path, **changes)
    interrupt(config, 4)
    assert_identical(whole, run(config))
    assert measurements(config.run_dir) == measurements(whole.run_dir)
    assert whole.model.recurrence.blocks[0].ffn.router.bias.shape == (3, 4)


def test_leftovers_of_a_kill_in_the_middle_of_a_save(tmp_path, uninterrupted):
    config = tiny(tmp_path, **EVERYTHING)
    interrupt(config, 7)
    checkpoints = config.run_dir / "checkpoints"
    # Killed while writing, and between the renaming and the marker; and in the middle of a line of metrics.
    for step in (7, 9):
        shutil.copytree(checkpoints / "step-00000006", checkpoints / f"step-{step:08d}.tmp")
    (checkpoints / "step-00000009.tmp" / ".tmpcrXagq").write_bytes(b"a part")  # as safetensors names it
    uncommitted = checkpoints / "step-00000009"
    shutil.copytree(checkpoints / "step-00000003", uncommitted)
    (uncommitted / "committed").unlink()
    with (config.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    continued = run(config)
    assert measurements(config.run_dir) == measurements(uninterrupted.run_dir)
    assert_identical(uninterrupted, continued)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000006", "step-00000009"]
    assert (checkpoints / "latest").read_text() == "step-00000009"


def test_resume_from_a_named_checkpoint_in_another_run(tmp_path, uninterrupted):
    source = saved(uninterrupted, 6)
    config = tiny(tmp_path, **EVERYTHING, run__resume=str(source))
    interrupt(config, 8)
    continued = run(config)
    assert measurements(config.run_dir) == measurements(uninterrupted.run_dir)[6:]
    assert_identical(uninterrupted, continued)
    # Given again, the command continues this run and does not start over from the path.
    interrupt(tiny(tmp_path, **{**EVERYTHING, "train__steps": 12}, run__resume=str(source)), 10)
    assert [record["step"] for record in measurements(config.run_dir)] == [7, 8, 9, 10]


def test_data_starts_again_on_purpose_only(tmp_path, caplog):
    """From the same weights, with the batches of a fresh start on the other data."""
    run(tiny(tmp_path, train__steps=2, checkpoint__every=2))
    other = {"train__steps": 4, "data__path": str(tmp_path / "other.jsonl")}
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": f"Other {text}"}) + "\n" for text in documents()))
    with pytest.raises(MythosError, match=r"corpus was .*, is .*data\.on_mismatch=restart"):
        Trainer(tiny(tmp_path, **other))
    trainer = Trainer(tiny(tmp_path, **other, data__on_mismatch="restart"))
    assert trainer.step == 2 and "the data starts from its beginning" in caplog.text
    fresh = open_data(trainer.config, trainer.run_dir, {}).streams(trainer.config.run.seed)
    assert torch.equal(trainer.loader.next_batch().ids, fresh.next_batch(4).ids)
    # The position saved from here on is in the new data.
    trainer.run()
    assert Trainer(tiny(tmp_path, **{**other, "train__steps": 5})).step == 4


@pytest.mark.parametrize("every", [0, 3])
def test_what_was_trained_is_saved_when_data_fails(tmp_path, every):
    """The same command then continues as if nothing had been."""
    changes = {**EVERYTHING, "eval__every": 0, "checkpoint__every": every, "data__streams": 1, "train__global_batch": 4}
    (tmp_path / "whole").mkdir()
    whole = run(tiny(tmp_path / "whole", **changes))
    config = tiny(tmp_path, **changes)
    trainer = Trainer(config)
    fail_at(trainer, 6, "data: shard x cannot be reached")
    with pytest.raises(MythosError, match=r"shard x cannot be reached\nStopped after step 6, .*step-00000006"):
        trainer.run()
    assert_identical(whole, run(config))


def test_tokens_are_counted_over_a_change_of_the_batch(tmp_path):
    run(tiny(tmp_path, train__steps=2, train__global_batch=8))
    trainer = run(tiny(tmp_path, train__steps=3, train__global_batch=4))
    assert trainer.tokens == measurements(trainer.run_dir)[-1]["tokens"] == (2 * 8 + 4) * 32


def test_nothing_left_to_train(tmp_path, uninterrupted, capsys):
    """A finished run is validated again and summed up, wherever its checkpoint is."""
    before = (uninterrupted.run_dir / "metrics.jsonl").read_text()
    run(uninterrupted.config)
    assert (uninterrupted.run_dir / "metrics.jsonl").read_text() == before
    source = saved(uninterrupted, 9)
    run(tiny(tmp_path, **EVERYTHING, run__resume=str(source)))
    printed = capsys.readouterr().out
    assert printed.count("nothing to train: the run is at step 9") == 2
    expected = measurements(uninterrupted.run_dir)[-1]
    assert printed.count(f"{expected['val/loss@3']:.4f}") == 2
    assert f"checkpoint  {source}" in printed


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_killed_process_continues_with_identical_losses(tmp_path):
    changes = {**EVERYTHING, "train__steps": 28, "eval__every": 10, "eval__samples": 0, "checkpoint__every": 8}
    (tmp_path / "reference").mkdir()
    whole = run(tiny(tmp_path / "reference", **changes))
    command = write_settings(tmp_path, **changes)
    process = WarmPopen(
        [sys.executable, "train.py", str(command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    marker = tmp_path / "run" / "checkpoints" / "step-00000008" / "committed"
    deadline = time.monotonic() + 120
    try:
        while not marker.exists():
            assert process.poll() is None, "the run ended before its checkpoint"
            assert time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.005)
        time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 8 <= len(measurements(tmp_path / "run")) < 28, "killed in the middle"
    run(load_config(command))
    assert measurements(tmp_path / "run") == measurements(whole.run_dir)
    assert [record["step"] for record in measurements(tmp_path / "run")] == list(range(1, 29))
