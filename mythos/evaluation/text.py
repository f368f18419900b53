"""Bits per byte on text, at several depths."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from mythos.checkpoints.stored_model import OpenedModel
from mythos.config.data import DataConfig, ValidationConfig
from mythos.data.corpus import open_corpora
from mythos.data.pipeline import Data, open_data
from mythos.data.source import open_sources
from mythos.data.tasks import TaskSet
from mythos.data.tokenizer import Tokenizer
from mythos.data.validation import ValidationSet
from mythos.distributed.parallel import choose_dtype
from mythos.distributed.ranks import World
from mythos.errors import MythosError
from mythos.evaluation.continuations import DepthSetting
from mythos.evaluation.depth_sweep import adaptive_sums, batches_of, halting_measures, prediction, text_bytes
from mythos.evaluation.validation import validation_metrics
from mythos.model.halting import halting_rule
from mythos.model.rdt import RecurrentDepthTransformer

SEQUENCES, LENGTH = 64, 1024
"""Sequences that are measured and tokens of each, at most, where no run says how many."""
MICRO_BATCH = 8
"""Sequences computed at once where no run says how many."""


def validation_data(opened: OpenedModel, files: str | None, sequences: int | None) -> ValidationSet | TaskSet:
    """The run's validation set as its trainer makes it, or one of the same shape from other files.

    Args:
        opened: the model.
        files: a glob of parquet, jsonl or txt files, which messages call --data; None = the run's own.
        sequences: how many; None = as many as in training.

    Raises:
        MythosError: no text, or none that this model can be measured on.
    """
    run = opened.run
    if sequences is None:
        sequences = run.eval.batches * run.data.streams if run else SEQUENCES
    if files == "":
        raise MythosError("--data: got no name; give text files, e.g. --data 'texts/*.txt'")
    if run is None and files is None:
        raise MythosError("--data: an exported model knows no data; give text files, e.g. --data 'texts/*.txt'")
    if run is not None and run.data.kind == "reasoning":
        if files is not None:
            raise MythosError("--data: the run was trained on a reasoning task, which is made on the way; leave it out")
        return open_data(run, None, {}).validation(max(sequences, run.data.streams))  # as many of every stream
    data = run.data if run else DataConfig(sequence_length=min(opened.model.config.context_length, LENGTH))
    if files is not None:
        data = data.model_copy(update={"validation": ValidationConfig(path=files)})
    tokenizer = require_tokenizer(opened)
    sources = {} if data.validation.path else open_sources(data, open_corpora(data), tokenizer)
    return Data(data, tokenizer, sources).validation(sequences, option=None if files is None else "--data")


def as_in_training(
    opened: OpenedModel, device: torch.device, dtype: str | None, micro_batch: int | None
) -> tuple[torch.dtype, int]:
    """Type of matrix products and sequences computed at once: as given, else as in the model's training."""
    train = opened.run.train if opened.run else None
    micro_batch = micro_batch or (train.micro_batch if train and train.micro_batch != "auto" else MICRO_BATCH)
    return choose_dtype(dtype or (train.dtype if train else "auto"), device), micro_batch


def require_tokenizer(opened: OpenedModel) -> Tokenizer:
    """The model's tokenizer. Raises MythosError where there is none."""
    if opened.tokenizer is not None:
        return opened.tokenizer
    if opened.run is not None and opened.run.data.kind == "reasoning":
        raise MythosError(f"{opened.source} is of a reasoning run, which knows no text: use `mythos reasoning`")
    raise MythosError(
        f"{opened.source}: no tokenizer lies beside it, so no text can be measured. Give the run directory, or copy "
        "its folder tokenizer/ beside the folder that the checkpoint lies in."
    )


class TextScores(NamedTuple):
    """What a model makes of text."""

    bits_per_byte: float
    perplexity: float
    loops: float
    """Of a position, on average."""


def text_scores(
    model: RecurrentDepthTransformer,
    data: ValidationSet,
    settings: Sequence[DepthSetting],
    *,
    micro_batch: int,
    world: World,
    autocast: AbstractContextManager[Any],
) -> list[TextScores]:
    """Measure the same sequences at each setting. The rows are divided over the ranks, which all get the result."""
    size, tokens = text_bytes(data), data.ids[:, 1:].numel()
    alike = sorted({setting.loops for setting in settings if setting.rule is None})
    losses: dict[str, float] = {}
    if alike:
        losses = validation_metrics(
            model, data, depths=alike, main_depth=alike[-1], micro_batch=micro_batch, world=world, autocast=autocast
        )
    scores = []
    for setting in settings:
        if setting.rule is None:
            total = losses[f"val/loss@{setting.loops}"] * tokens
            _, perplexity, bits = prediction(total, tokens, size)
            loops = float(setting.loops)
        else:
            rule = halting_rule(model, setting.rule, setting.threshold)
            rows = range(world.rank, len(data.ids), world.size)
            with autocast:
                mine = batches_of(data, micro_batch, world.device, rows)
                sums = world.sum(adaptive_sums(model, mine, rule, setting.loops))
            _, perplexity, bits, loops, _, _ = halting_measures(sums, size)
        assert bits is not None
        scores.append(TextScores(bits, perplexity, loops))
    return scores
