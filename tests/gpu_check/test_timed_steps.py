"""Optimizer steps to be timed, clocks, and counters for memory."""

import threading
import time
from pathlib import Path

import torch

from mythos.gpu_check import timed_steps as timing
from mythos.gpu_check.timed_steps import Steps, random_batch
from tests.runs import tiny


def test_cpu_time_leaves_out_what_the_clock_counts():
    seconds = timing.timed(lambda: time.sleep(0.05))
    assert seconds.wall >= 0.05 > seconds.cpu


def test_the_peak_of_tensors_is_exact():
    def work():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(250)
        return second, third

    assert timing.tensor_peak(work) == 4 * 1500


def test_what_another_thread_frees_is_not_counted_for_ever():
    """Neither where its memory is used again, nor where it is not."""
    kept = []

    def work():
        kept.append(torch.empty(100_000))
        for size in (300_000, 300_000, 500_000):
            passed = [torch.empty(size)]
            thread = threading.Thread(target=passed.clear)
            thread.start()
            thread.join()
        del passed
        return torch.empty(200_000)

    assert timing.tensor_peak(work) == 4 * 300_000


def test_shared_storage_is_held_once():
    tensor = torch.empty(10)
    assert timing.tensor_bytes([tensor, tensor[2:], torch.empty(5)]) == 60


def test_a_step_is_the_trainers_at_its_target_depth(tmp_path):
    config = tiny(tmp_path, model__vocab_size=384)  # a curriculum that starts at one loop
    with Steps(config) as steps:
        trainer, folder = steps.trainer, Path(steps.folder.name)
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        steps()
        changed = sum(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
        assert changed > len(before) // 2 and int(trainer.skipped) == 0
        assert max(steps.loops) > 1 and steps.loops == trainer.schedule.plan(config.train_steps - 1).loops
        # Between steps: weights, two moments and a counter for each, and the router's bias.
        weights = sum(parameter.nbytes for parameter in before)
        assert steps.held_bytes() == 3 * weights + 4 * len(before) + 4 * config.model.n_experts
        assert steps.peak_tensor_bytes() > steps.held_bytes() + weights
        assert folder.exists()
    assert not folder.exists()
    assert not (tmp_path / "run").exists()


def test_random_tokens(tmp_path):
    config = tiny(tmp_path, model__vocab_size=384, data__mask_documents=True)
    batch = random_batch(config)
    assert batch.ids.shape == (8, 33) and batch.rows.tolist() == list(range(8))
    assert batch.ids.min() >= 0 and batch.ids.max() < 384
    assert batch.document_ids is not None and batch.document_ids[3].unique_consecutive().tolist() == [0, 1, 2, 3]
    with Steps(config) as steps:
        steps()
        assert int(steps.trainer.skipped) == 0
