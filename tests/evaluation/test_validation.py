"""Validation compared with running the model by row and depth."""

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.data.validation import ValidationSet
from mythos.distributed.ranks import Ranks, World
from mythos.evaluation.execution import Execution
from mythos.evaluation.validation import validation_metrics
from mythos.model.config import ModelConfig
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.training.metrics import losses_by_depth
from tests.noise import name_generator
from tests.runs import SETTINGS

ROWS, LENGTH = 5, 16
ALONE = World(torch.device("cpu"), Ranks(), Ranks())


def build(**changes: Any) -> RecurrentDepthTransformer:
    """A small model with seeded noise in every weight."""
    model = RecurrentDepthTransformer(ModelConfig(**{**SETTINGS["model"], "vocab_size": 128, **changes})).initialize(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=name_generator(1, name)), alpha=0.1)
    return model


def data(masked: bool) -> ValidationSet:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (ROWS, LENGTH + 1), generator=generator)
    documents = (torch.arange(LENGTH) // 5).int().expand(ROWS, LENGTH) if masked else None
    return ValidationSet(ids, documents, torch.tensor([11, 70, 33, 25, 64]))


def measure(model: RecurrentDepthTransformer, rows: ValidationSet, micro_batch: int = 2, **changes: Any) -> dict:
    options: dict[str, Any] = {"depths": [1, 4], "main_depth": 3, **changes}
    return validation_metrics(model, rows, Execution(micro_batch, ALONE, contextlib.nullcontext()), **options)


@pytest.mark.parametrize("masked", [False, True])
def test_every_depth_equals_a_run_by_hand(masked):
    """Five rows in micro-batches of two: the last micro-batch has half the weight."""
    model, rows = build(core_layers=2), data(masked)
    metrics = measure(model, rows)
    routed: list[Tensor] = []
    for block in model.recurrence.blocks:
        block.ffn.router.register_forward_hook(lambda _, __, out: routed.append(out[1]))
    totals, deltas, shared = dict.fromkeys((1, 3, 4), 0.0), [], []
    for row, ids in enumerate(rows.ids):
        documents = None if rows.document_ids is None else rows.document_ids[row : row + 1]
        for loops in totals:
            routed.clear()
            with torch.no_grad():
                output = model(ids[None, :-1], loops=loops, document_ids=documents)
            totals[loops] += F.cross_entropy(output.logits[0], ids[1:], reduction="sum").item()
            if loops == 3:
                deltas.append(output.state_delta.item())
                for before, after in zip(routed[2:4], routed[4:6], strict=True):
                    shared += [len(set(b) & set(a)) / 2 for b, a in zip(before.tolist(), after.tolist(), strict=True)]
    tokens = ROWS * LENGTH
    assert set(metrics) == {
        *(f"val/loss@{loops}" for loops in totals),
        *("val/loss", "val/bits_per_byte", "val/state_delta", "moe/depth_overlap"),
    }
    for loops, total in totals.items():
        assert metrics[f"val/loss@{loops}"] == pytest.approx(total / tokens, rel=1e-5)
    assert len({round(metrics[f"val/loss@{loops}"], 3) for loops in totals}) == 3, "depths must differ"
    assert metrics["val/loss"] == metrics["val/loss@3"]
    assert metrics["val/bits_per_byte"] == pytest.approx(totals[3] / math.log(2) / (11 + 70 + 33 + 25 + 64), rel=1e-5)
    assert metrics["val/state_delta"] == pytest.approx(sum(deltas) / ROWS, rel=1e-4)
    assert len(shared) == ROWS * LENGTH * 2
    assert metrics["moe/depth_overlap"] == pytest.approx(sum(shared) / len(shared), rel=1e-5)
    assert 0 < metrics["moe/depth_overlap"] < 1


def test_micro_batch_does_not_matter_and_nothing_changes():
    model, rows = build(), data(masked=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = measure(model, rows, micro_batch=5)
    assert measure(model, rows, micro_batch=3) == pytest.approx(whole, rel=1e-5)
    assert measure(model, rows, micro_batch=5) == whole
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dense_core_and_fixed_depth():
    dense = measure(build(core_ffn="dense"), data(masked=False))
    assert "moe/depth_overlap" not in dense
    fixed = build(injection="none", loops=1, lora_rank=0)
    metrics = measure(fixed, data(masked=False), depths=[1], main_depth=1)
    assert metrics["val/loss"] == metrics["val/loss@1"]
    assert "moe/depth_overlap" not in metrics, "one pass has none before it"


def test_losses_by_depth_sorts_by_number():
    record = {"val/loss@16": 2.0, "step": 3, "val/loss": 2.5, "val/loss@4": 2.5, "val/loss@1": 4.0}
    assert list(losses_by_depth(record).items()) == [(1, 4.0), (4, 2.5), (16, 2.0)]
