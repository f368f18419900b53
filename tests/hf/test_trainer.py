"""transformers' `Trainer` and its options, compared with gradient descent on rows without padding."""

import copy
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LabelSmoother

from mythos.hf import MythosForCausalLM
from tests.hf.conftest import VOCABULARY
from tests.hf.test_model import CLOSE, random_ids

BuildModel = Callable[..., MythosForCausalLM]
Objective = Callable[[Tensor, Tensor], Tensor]
LENGTHS = (3, 9, 6, 4)
ROWS = [{"input_ids": random_ids(1, length, seed=length)[0].tolist()} for length in LENGTHS]
RATE = 0.05
FIELDS = {"attention": "gqa", "core_ffn": "dense", "core_layers": 1, "loops": 2}


def collator(side: str, hidden: int = 0) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A collator that pads on one side; the first `hidden` tokens of a row have no label."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in batch:
            ids = row["input_ids"]
            labels = [-100] * hidden + ids[hidden:]
            for name, values, filler in zip(columns, (ids, [1] * len(ids), labels), (7, 0, -100), strict=True):
                gap = [filler] * (longest - len(ids))
                columns[name].append(gap + values if side == "left" else values + gap)
        return {name: torch.tensor(values) for name, values in columns.items()}

    return collate


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    """Label smoothing 0.1: a tenth of the weight is spread over all ids."""
    logs = logits.log_softmax(-1)
    return -(0.9 * logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1) + 0.1 * logs.mean(-1)).sum()


def squared(logits: Tensor, targets: Tensor) -> Tensor:
    """A custom objective."""
    return F.cross_entropy(logits, targets, reduction="none").square().sum()


def squared_of_batch(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The same in the form of `compute_loss_func`."""
    targets, logits = labels[:, 1:].flatten(), outputs.logits[:, :-1].flatten(0, 1)
    return squared(logits[targets != -100], targets[targets != -100]) / num_items_in_batch


SPLITS = [("left", 4, 1), ("left", 2, 2), ("right", 1, 4)]
"""Padding side, micro-batch, and micro-batches per step."""
# Before 5.24 transformers summed the smoothed losses of micro-batches, for all models.
SMOOTHED_SPLITS = SPLITS if "num_items_in_batch" in signature(LabelSmoother.__call__).parameters else SPLITS[:1]
OPTIONS: list[tuple[str, Objective, dict[str, Any], dict[str, Any]]] = [
    ("plain", cross_entropy, {}, {}),
    ("smoothing", smoothed, {"label_smoothing_factor": 0.1}, {}),
    ("own", squared, {}, {"compute_loss_func": squared_of_batch}),
    ("checkpointing", cross_entropy, {"gradient_checkpointing": True}, {}),
    ("no averaging", cross_entropy, {"average_tokens_across_devices": False}, {}),
    ("all columns", cross_entropy, {"remove_unused_columns": False, "label_names": ["labels"]}, {}),
]


def arguments(folder: Path, size: int, accumulated: int, **options: Any) -> TrainingArguments:
    fixed: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        "gradient_accumulation_steps": accumulated,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return TrainingArguments(folder, **{**fixed, **options})


class LossRecorder(TrainerCallback):
    """Records the losses before rounding."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def trained(
    model: torch.nn.Module,
    folder: Path,
    size: int,
    accumulated: int,
    collate: Any,
    options: Any = None,
    more: Any = None,
) -> list[float]:
    set_seed(0)
    recorder = LossRecorder()
    settings = arguments(folder, size, accumulated, **(options or {}))
    Trainer(model, settings, train_dataset=ROWS, data_collator=collate, callbacks=[recorder], **(more or {})).train()
    return recorder.losses


def descended(model: MythosForCausalLM, objective: Objective, hidden: int = 0) -> list[float]:
    """Losses of three steps of gradient descent, with every row by itself and without padding."""
    losses = []
    for _ in range(3):
        total, count = torch.zeros(()), 0
        for row in ROWS:
            ids = torch.tensor([row["input_ids"]])
            first = max(hidden, 1)
            logits = model.model(ids, loops=model.config.mean_loops).logits[0, first - 1 : -1, :VOCABULARY]
            total = total + objective(logits, ids[0, first:])
            count += len(ids[0, first:])
        (total / count).backward()
        losses.append(total.item() / count)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
                    parameter.grad = None
    return losses


@pytest.mark.parametrize(
    ("objective", "options", "more"), [row[1:] for row in OPTIONS], ids=[row[0] for row in OPTIONS]
)
def test_every_objective_is_that_of_rows_without_padding(
    build_model: BuildModel, tmp_path: Path, objective: Objective, options: dict[str, Any], more: dict[str, Any]
) -> None:
    """Losses of three steps do not depend on the padding side or the micro-batches."""
    reference = build_model(**FIELDS)
    expected = descended(reference, objective)
    assert expected[2] < expected[0] - 0.01
    for side, size, accumulated in SMOOTHED_SPLITS if objective is smoothed else SPLITS:
        model = build_model(**FIELDS)
        losses = trained(model, tmp_path, size, accumulated, collator(side), options, more)
        assert losses == pytest.approx(expected, abs=2e-4), (side, size)  # as many digits as Trainer logs
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), parameter, **CLOSE)


def test_a_prompt_without_labels(build_model: BuildModel, tmp_path: Path) -> None:
    expected = descended(build_model(**FIELDS), cross_entropy, hidden=2)
    for side, size, accumulated in (("left", 4, 1), ("left", 2, 2), ("right", 4, 1)):
        assert trained(build_model(**FIELDS), tmp_path, size, accumulated, collator(side, hidden=2)) == pytest.approx(
            expected, abs=2e-4
        )


def test_no_smoothing_is_the_plain_loss_as_for_llama(build_model: BuildModel, tmp_path: Path) -> None:
    """Also with a vocabulary smaller than the embedding."""

    def llama() -> LlamaForCausalLM:
        set_seed(1)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
            )
        )

    for build in (llama, lambda: build_model(**FIELDS)):
        plain, smooth = (
            trained(build(), tmp_path, 4, 1, collator("right"), {"label_smoothing_factor": factor})
            for factor in (0.0, 1e-9)
        )
        assert plain == pytest.approx(smooth, abs=2e-4)


def test_validation_loss_does_not_depend_on_the_side(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model(**FIELDS)
    for options in ({}, {"prediction_loss_only": True}, {"label_smoothing_factor": 0.1}):
        losses = []
        for side in ("left", "right"):
            trainer = Trainer(
                model, arguments(tmp_path, 4, 1, **options), eval_dataset=ROWS, data_collator=collator(side)
            )
            losses.append(trainer.evaluate()["eval_loss"])
        objective = smoothed if "label_smoothing_factor" in options else cross_entropy
        assert losses == pytest.approx([descended(copy.deepcopy(model), objective)[0]] * 2, abs=1e-4)
    assert trainer.predict(ROWS).label_ids.shape == (4, 9)


def test_noise_on_embeddings(build_model: BuildModel, tmp_path: Path) -> None:
    """`neftune_noise_alpha` adds noise in training only."""
    plain, noisy = ([], {}), ([], {"neftune_noise_alpha": 5.0})
    for losses, options in (plain, noisy):
        model = build_model(**FIELDS)
        before = model(random_ids(1, 5)).logits
        losses += trained(model, tmp_path, 4, 1, collator("left"), {"learning_rate": 0.0, **options})
        assert torch.equal(model(random_ids(1, 5)).logits, before)
    assert plain[0][0] == plain[0][2] and len({plain[0][0], *noisy[0]}) == 4


def test_a_loss_function_of_the_model_is_used(build_model: BuildModel) -> None:
    """`model.loss_function = ...` is called with logits, labels and vocab_size, as for transformers' models."""
    model, ids = build_model(), random_ids(2, 7)
    expected = model(ids).logits.sum() + ids.sum()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() + labels.sum()
    for options in ({}, {"use_cache": True}, {"logits_to_keep": 1}):
        torch.testing.assert_close(model(ids, labels=ids, **options).loss, expected, **CLOSE)


def test_labels_that_are_shifted_or_of_another_mark(build_model: BuildModel) -> None:
    model, ids = build_model(), random_ids(2, 7)
    expected = model(ids, labels=ids).loss
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, labels=torch.zeros_like(ids), shift_labels=shifted).loss, expected)
    marked = ids.clone()
    marked[:, 3] = 5
    other = model(ids, labels=marked.masked_fill(marked == 5, -100)).loss
    assert torch.equal(model(ids, labels=marked, ignore_index=5).loss, other)


def test_nothing_is_predicted_from_padding(build_model: BuildModel) -> None:
    """Logits at padding are zero, so a loss that counts them cannot use later tokens."""
    model, ids = build_model(), random_ids(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    for options in ({}, {"use_cache": True}):
        assert (model(ids, attention_mask=mask, **options).logits[mask == 0] == 0).all()


@pytest.mark.parametrize("fields", [{}, {"attention": "gqa", "value_embeddings": True}])
def test_packed_rows(build_model: BuildModel, fields: dict[str, Any]) -> None:
    """Positions that restart, as from flattening collators, separate documents."""
    model, ids = build_model(**fields), random_ids(1, 9)
    parts = ids.split((4, 3, 2), dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    output = model(ids, position_ids=positions)
    alone = torch.cat([model(part).logits for part in parts], dim=1)
    torch.testing.assert_close(output.logits, alone, **CLOSE)
    assert not torch.allclose(output.logits, model(ids).logits, atol=1e-3)
    with pytest.raises(ValueError, match="position_ids: a mythos model counts the tokens of each row"):
        model(ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="position_ids: a mythos model counts the tokens of each row"):
        model(ids, position_ids=positions, use_cache=True)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: .* position_ids that start again at 0"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 7, 9]))


def test_positions_that_tokens_have_anyway(build_model: BuildModel) -> None:
    model, ids = build_model(), random_ids(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = model(ids, attention_mask=mask).logits
    for positions in (torch.arange(6)[None], (mask.cumsum(1) - 1).clamp(min=0), torch.arange(6).expand(2, -1) + 3):
        assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, expected)
    with pytest.raises(ValueError, match=r"position_ids: got shape \(1, 5\); allowed: \(2, 6\)"):
        model(ids, position_ids=torch.arange(5)[None])
