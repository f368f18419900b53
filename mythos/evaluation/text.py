"""Bits per byte on text, at several depths."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from mythos.checkpoints.stored_model import OpenedModel
from mythos.config.data import DataConfig, ValidationConfig
from mythos.data import embedded
from mythos.data.corpus import open_corpora
from mythos.data.pipeline import Data, open_data
from mythos.data.source import Source, open_sources
from mythos.data.tasks import TaskSet
from mythos.data.validation import ValidationSet
from mythos.distributed.parallel import choose_dtype
from mythos.errors import MythosError
from mythos.evaluation.continuations import DepthSetting
from mythos.evaluation.depth_sweep import adaptive_sums, batches_of, halting_measures, prediction, text_bytes
from mythos.evaluation.execution import Execution
from mythos.evaluation.validation import validation_metrics
from mythos.model.halting import halting_rule
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.training.metrics import losses_by_depth

logger = logging.getLogger(__name__)

SEQUENCES, LENGTH = 64, 1024
"""Number of sequences, for a model without a run configuration, and maximum tokens of each, if those of its training
are not known."""
MICRO_BATCH = 8
"""Sequences computed at once, for a model without a run configuration."""


def validation_data(opened: OpenedModel, files: str | None, sequences: int | None) -> ValidationSet | TaskSet:
    """The validation set that the run's trainer uses, or one of the same shape from other files.

    Warns if the run's own data is other text than it was trained on.

    Args:
        opened: the model.
        files: a glob of parquet, jsonl or txt files (`--data` in messages); None = the run's own data.
        sequences: number of sequences; None = as many as in training.

    Raises:
        MythosError: there is no text, or the model has no tokenizer for it.
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
            raise MythosError("--data: the run was trained on a reasoning task, which generates its data; leave it out")
        # At least one sequence from every stream.
        return open_data(run, None, {}).validation(max(sequences, run.data.streams))
    length = opened.sequence_length or min(opened.model.config.context_length, LENGTH)
    data = run.data if run else DataConfig(sequence_length=length, mask_documents=opened.mask_documents)
    if files is not None:
        data = data.model_copy(update={"validation": ValidationConfig(path=files)})
    tokenizer = opened.require_tokenizer()
    sources = {} if data.validation.path else open_sources(data, open_corpora(data), tokenizer)
    if os.environ.get("RANK", "0") == "0" and (changes := _text_changes(data, sources, opened.corpora)):
        logger.warning(
            "data: this is other text than the run was trained on: its hash %s. The figures cannot be compared with "
            "those of the run, which may have been trained on part of this text",
            "; ".join(changes),
        )
    return Data(data, tokenizer, sources).validation(sequences, option=None if files is None else "--data")


def _text_changes(
    data: DataConfig, sources: Mapping[str, tuple[Source, float]], corpora: Mapping[str, str]
) -> list[str]:
    """Say of every source of other text than in training, whose hashes are `corpora`, what its hash was and is."""
    changes = []
    for name, (source, _) in sources.items():
        before, here = corpora.get(name), source.identity["corpus"]
        if before is None or before == here:
            continue
        config = data.named_sources[name]
        if config.kind == "embedded":
            # Earlier versions gathered text from installed packages, and stored no revision.
            before, here = config.revision or f"{before} (text of installed packages)", embedded.revision()
        changes.append(f"{f'of {name} ' if len(sources) > 1 else ''}was {before} and is {here}")
    return changes


def as_in_training(
    opened: OpenedModel, device: torch.device, dtype: str | None, micro_batch: int | None
) -> tuple[torch.dtype, int]:
    """Matmul type and micro-batch: the arguments, or the values used in the model's training."""
    train = opened.run.train if opened.run else None
    micro_batch = micro_batch or (train.micro_batch if train and train.micro_batch != "auto" else MICRO_BATCH)
    return choose_dtype(dtype or (train.dtype if train else "auto"), device), micro_batch


class TextScores(NamedTuple):
    """How well a model predicts a text."""

    bits_per_byte: float
    perplexity: float
    loops: float
    """Mean loops of a position."""


def text_scores(
    model: RecurrentDepthTransformer,
    data: ValidationSet,
    settings: Sequence[DepthSetting],
    execution: Execution,
) -> list[TextScores]:
    """Measure the same sequences at each setting. Collective: ranks share the rows, and all get the result."""
    size, tokens, world = text_bytes(data), data.ids[:, 1:].numel(), execution.world
    depths = sorted({setting.loops for setting in settings if setting.rule is None})
    losses: dict[int, float] = {}
    if depths:
        losses = losses_by_depth(validation_metrics(model, data, execution, depths=depths, main_depth=depths[-1]))
    scores = []
    for setting in settings:
        if setting.rule is None:
            _, perplexity, bits = prediction(losses[setting.loops] * tokens, tokens, size)
            loops = float(setting.loops)
        else:
            rule = halting_rule(model, setting.rule, setting.threshold)
            rows = range(world.rank, len(data.ids), world.size)
            with execution.autocast:
                mine = batches_of(data, execution.micro_batch, world.device, rows)
                sums = world.sum(adaptive_sums(model, mine, rule, setting.loops))
            measures = halting_measures(sums, size)
            perplexity, bits, loops = measures.perplexity, measures.bits_per_byte, measures.loops
        assert bits is not None
        scores.append(TextScores(bits, perplexity, loops))
    return scores
