"""Log-likelihoods of continuations of prompts, at several depths at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.config.checking import shown
from mythos.data.tokenizer import Tokenizer
from mythos.errors import MythosError
from mythos.evaluation.execution import Execution
from mythos.evaluation.validation import right_rows
from mythos.model import IGNORE_INDEX
from mythos.model.cache import DecodeCache
from mythos.model.halting import default_threshold, halting_rule
from mythos.model.layers import autocast_dtype
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.progress import progress_bar


@dataclass(frozen=True)
class DepthSetting:
    """The depth of a model: the same number of loops at every position, or a halting rule."""

    loops: int
    """Loops of every position; with a rule, the maximum."""
    rule: str | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        return str(self.loops) if self.rule is None else f"{self.rule} {self.threshold:g}"


def choose_settings(
    model: RecurrentDepthTransformer,
    mean_loops: int,
    loops: Sequence[int | None],
    rule: str | None = None,
    thresholds: Sequence[float] = (),
) -> list[DepthSetting]:
    """The settings to measure a model at: one per loop count, and for None (auto) one per threshold.

    auto stops positions by a halting rule, after at most the training mean. `rule` defaults to the model's own,
    `thresholds` to the rule's. If there is no rule, auto is the training mean.

    Raises ValueError for loops or rules that the model does not support, or a threshold out of range.
    """
    settings = []
    rule_default: list[float | None] = [None]
    for count in loops:
        model.check_loops(mean_loops if count is None else count, 1)
        if count is not None:
            settings.append(DepthSetting(count))
            continue
        name = model.config.halting if rule is None else rule
        for threshold in thresholds or rule_default:
            if halting_rule(model, name, threshold) is None:
                settings.append(DepthSetting(mean_loops))
            else:
                settings.append(
                    DepthSetting(mean_loops, name, default_threshold(name) if threshold is None else threshold)
                )
    return list(dict.fromkeys(settings))


class Request(NamedTuple):
    """Token ids to score, after a context; together at most one token more than the model's context."""

    context: list[int]
    """At least one id."""
    continuation: list[int]


class Score(NamedTuple):
    """The result of a request."""

    log_likelihood: float
    """Log-likelihood of the continuation, nats."""
    greedy: bool
    """Whether greedy decoding gives the continuation: each of its tokens is the likeliest."""
    loops: float
    """Mean loops of a position."""


def encode_requests(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], context_length: int
) -> tuple[list[Request], int]:
    """Encode pairs of context and continuation; also returns how many contexts were cut to fit.

    As in lm-evaluation-harness, both are tokenized together, trailing spaces of the context belong to the continuation,
    an empty context is the end-of-document token, and a context that does not fit loses its beginning. If a token of
    the whole text spans the boundary, the continuation is tokenized by itself. (The harness skips as many tokens as the
    context has, and so scores another text or none.)

    Raises MythosError for a continuation that is empty, that has no token of its own, or that leaves less than half of
    the model's context to a context that does not fit.
    """
    pairs = []
    for context, continuation in texts:
        stripped = context.rstrip()
        pairs.append((stripped, context[len(stripped) :] + continuation))
    contexts = tokenizer.encode_batch([context for context, _ in pairs])
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    requests, cut = [], 0
    for (context, continuation), context_ids, whole_ids in zip(pairs, contexts, wholes, strict=True):
        ids = whole_ids[len(context_ids) :]
        if whole_ids[: len(context_ids)] != context_ids:
            [ids] = tokenizer.encode_batch([continuation])
            # Some tokenizers start every text with a space, or drop characters that do not start a word.
            if tokenizer.decode([*context_ids, *ids]) != tokenizer.decode(whole_ids):
                raise MythosError(
                    f"the continuation {shown(continuation)} of {shown(context)} shares a token with it, and this "
                    "tokenizer has no tokens for it alone: end the context, or begin the continuation, at a word"
                )
        if not ids:
            remedy = "give text that the tokenizer does not drop" if continuation else "give text that is not empty"
            raise MythosError(f"the continuation {shown(continuation)} has no token of its own: {remedy}")
        request = fit(context_ids or [tokenizer.eos_id], ids, context_length)
        cut += len(request.context) < len(context_ids)
        requests.append(request)
    return requests, cut


def fit(context: list[int], continuation: list[int], context_length: int) -> Request:
    """A request with the beginning of its context cut off as far as it does not fit.

    Raises MythosError for a continuation that does not fit by itself. Also for one that leaves less than half of the
    model's context to a context that must be cut: the score would be for a different question.
    """
    if len(continuation) > context_length:
        raise MythosError(
            f"a continuation of {len(continuation)} tokens: the model's context is {context_length} "
            "(model.context_length), and one token precedes it; give shorter ones"
        )
    room = context_length + 1 - len(continuation)
    if len(context) > room < least_prompt(context_length):
        raise MythosError(
            f"a continuation of {len(continuation)} tokens leaves {room} of its prompt's {len(context)}: the model's "
            f"context is {context_length} (model.context_length), and a prompt that is cut keeps at least half; "
            "give shorter ones"
        )
    return Request(context[-room:], continuation)


def least_prompt(context_length: int) -> int:
    """Minimum number of tokens of a prompt that must be cut: half of the model's context."""
    return -(-context_length // 2)


def score_requests(
    model: RecurrentDepthTransformer,
    requests: Sequence[Request],
    settings: Sequence[DepthSetting],
    execution: Execution,
) -> list[list[Score]]:
    """The scores of all requests, in their order, for each setting.

    One run of the deepest setting gives the scores of all settings without a rule; each setting with a rule is a
    separate run, and needs the whole model on every rank. Collective: requests of similar length form batches, which
    are divided over the ranks. The batches do not depend on the number of ranks, and all ranks get the whole result.
    """
    world, micro_batch = execution.world, execution.micro_batch
    order = sorted(range(len(requests)), key=lambda index: -sum(map(len, requests[index])))
    batches = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
    mine = range(world.rank, len(batches), world.size)
    by_request: dict[int, list[Score]] = {}
    bar: Any
    with (
        execution.autocast,
        progress_bar(
            total=len(batches), unit="batch", desc="scoring", disable=not execution.progress, leave=False
        ) as bar,
    ):
        for turn in range(-(-len(batches) // world.size)):
            execution.check()
            # A rank without a batch left repeats the first one, uncounted: under FSDP the others wait for it.
            batch = batches[mine[turn] if turn < len(mine) else 0]
            scores = score_batch(model, [requests[index] for index in batch], settings)
            if turn < len(mine):
                by_request |= zip(batch, scores, strict=True)
            bar.update(world.size)
    for part in world.ranks.gather(by_request):
        by_request |= part
    return [[by_request[index][number] for index in range(len(requests))] for number in range(len(settings))]


# Every batch has another shape, and blocks compiled for training would be recompiled for each of them.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def score_batch(
    model: RecurrentDepthTransformer, requests: Sequence[Request], settings: Sequence[DepthSetting]
) -> list[list[Score]]:
    """The scores of one batch: for each request its score at every setting."""
    lengths = [len(context) + len(continuation) - 1 for context, continuation in requests]
    # Padding is on the right, where no token attends to it.
    ids = torch.zeros(len(requests), max(lengths), dtype=torch.int64)
    targets, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids, dtype=torch.bool)
    for row, (length, (context, continuation)) in enumerate(zip(lengths, requests, strict=True)):
        ids[row, :length] = torch.tensor([*context, *continuation[:-1]])
        targets[row, len(context) - 1 : length] = torch.tensor(continuation)
        mask[row, :length] = True
    device = model.embedding.weight.device
    ids, targets, mask = ids.to(device), targets.to(device), mask.to(device)
    by_setting = list(_score_by_setting(model, ids, targets, mask, settings))
    return [list(scores) for scores in zip(*by_setting, strict=True)]


def _score_by_setting(
    model: RecurrentDepthTransformer, ids: Tensor, targets: Tensor, mask: Tensor, settings: Sequence[DepthSetting]
) -> Iterator[list[Score]]:
    """The scores of a batch's rows, one setting after the other; tensors are (B, S)."""
    depths = sorted({setting.loops for setting in settings if setting.rule is None})
    readouts = model.read_depths(ids, targets, depths, judged=True) if depths else []
    by_loops = {readout.loops: readout for readout in readouts}
    counts = mask.sum(1)
    for setting in settings:
        if setting.rule is None:
            readout = by_loops[setting.loops]
            losses, right, loops = readout.losses, readout.right, counts * setting.loops
            assert right is not None
        else:
            dtype = autocast_dtype(model.head_weight)
            cache = DecodeCache(model.config, len(ids), loops=setting.loops, dtype=dtype, device=ids.device)
            rule = halting_rule(model, setting.rule, setting.threshold)
            logits, used = model.extend(ids, cache, mask=mask, loops=setting.loops, halting=rule, logits="all")
            losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
            right, loops = logits.argmax(-1) == targets, used.sum(1)
        greedy = right_rows(right, targets)
        numbers = torch.stack((-losses.double().sum(1), greedy.double(), loops / counts), dim=1)
        yield [Score(likelihood, bool(is_greedy), depth) for likelihood, is_greedy, depth in numbers.tolist()]
