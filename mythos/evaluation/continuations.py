"""How likely a model finds continuations of prompts, at several depths at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.config.checking import shown
from mythos.data.tokenizer import Tokenizer
from mythos.distributed.ranks import World
from mythos.errors import MythosError
from mythos.model import IGNORE_INDEX
from mythos.model.cache import DecodeCache
from mythos.model.halting import default_threshold, halting_rule
from mythos.model.layers import autocast_dtype
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.progress import progress_bar


@dataclass(frozen=True)
class DepthSetting:
    """How deep a model is run: every position alike, or until a rule of halting stops it."""

    loops: int
    """Of every position; with a rule, the most."""
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
    """What to measure a model at: the given loops, and for None (auto) the training mean under a rule of halting.

    `rule` defaults to the model's own, `thresholds` to the rule's. Without a rule auto is the training mean.

    Raises ValueError for loops or rules that the model cannot run, or a threshold out of range.
    """
    settings = []
    for count in loops:
        model.check_loops(mean_loops if count is None else count, 1)
        if count is not None:
            settings.append(DepthSetting(count))
            continue
        name = model.config.halting if rule is None else rule
        for threshold in thresholds or [None]:
            if halting_rule(model, name, threshold) is None:
                settings.append(DepthSetting(mean_loops))
            else:
                settings.append(
                    DepthSetting(mean_loops, name, default_threshold(name) if threshold is None else threshold)
                )
    return list(dict.fromkeys(settings))


class Request(NamedTuple):
    """Token ids whose likelihood is asked for, after others; together at most one more than the context."""

    context: list[int]
    """At least one."""
    continuation: list[int]


class Score(NamedTuple):
    """A request's answer."""

    log_likelihood: float
    """Of the continuation, in nats."""
    greedy: bool
    """Whether each of its tokens is the likeliest."""
    loops: float
    """Of a position, on average."""


def encode_requests(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], context_length: int
) -> tuple[list[Request], int]:
    """Contexts and continuations as token ids, and how many contexts were cut to fit.

    As lm-evaluation-harness does it: both are tokenized together, spaces that end the context belong to the
    continuation, an empty context is the end of a document, and a context that does not fit loses its beginning.
    Where a token of the whole text spans the boundary the continuation is tokenized alone: the harness would take what
    stands after as many tokens as the context has, which is another text, or none.

    Raises MythosError for a continuation that is empty, that has no tokens of its own, or that leaves less than half of
    the model's context to a context that does not fit.
    """
    pairs = []
    for context, continuation in texts:
        kept = context.rstrip()
        pairs.append((kept, context[len(kept) :] + continuation))
    contexts = tokenizer.encode_batch([context for context, _ in pairs])
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    requests, cut = [], 0
    for (kept, text), context, whole in zip(pairs, contexts, wholes, strict=True):
        continuation = whole[len(context) :]
        if whole[: len(context)] != context:
            [continuation] = tokenizer.encode_batch([text])
            # Some tokenizers begin every text with a space, or drop what does not begin a word.
            if tokenizer.decode([*context, *continuation]) != tokenizer.decode(whole):
                raise MythosError(
                    f"the continuation {shown(text)} of {shown(kept)} shares a token with it, and this tokenizer has "
                    "no tokens for it alone: end the context, or begin the continuation, at a word"
                )
        if not continuation:
            rule = "give text that the tokenizer does not drop" if text else "give text that is not empty"
            raise MythosError(f"the continuation {shown(text)} has no token of its own: {rule}")
        request = fit(context or [tokenizer.eos_id], continuation, context_length)
        cut += len(request.context) < len(context)
        requests.append(request)
    return requests, cut


def fit(context: list[int], continuation: list[int], context_length: int) -> Request:
    """A request whose context has lost as much of its beginning as does not fit.

    Raises MythosError for a continuation that alone does not fit, and for one that would leave less than half of the
    model's context to a context that has to be cut: its score would be the answer to another question.
    """
    if len(continuation) > context_length:
        raise MythosError(
            f"a continuation of {len(continuation)} tokens: the model's context is {context_length} "
            "(model.context_length), and one token stands before it; give shorter ones"
        )
    room = context_length + 1 - len(continuation)
    if len(context) > room < least_prompt(context_length):
        raise MythosError(
            f"a continuation of {len(continuation)} tokens leaves {room} of its prompt's {len(context)}: the model's "
            f"context is {context_length} (model.context_length), of which a prompt that is cut keeps at least half; "
            "give shorter ones"
        )
    return Request(context[-room:], continuation)


def least_prompt(context_length: int) -> int:
    """Tokens that a prompt which has to be cut keeps at least: half of the model's context."""
    return -(-context_length // 2)


def score_requests(
    model: RecurrentDepthTransformer,
    requests: Sequence[Request],
    settings: Sequence[DepthSetting],
    *,
    micro_batch: int,
    world: World,
    autocast: AbstractContextManager[Any],
    progress: bool = False,
    check: Callable[[], None] = lambda: None,
) -> list[list[Score]]:
    """The scores of all requests, in their order, for each setting.

    All settings of equal loops are read out of one run of the deepest; each rule is a run of its own. Batches are
    formed of requests of like length and dealt to the ranks, which all get the whole result: one process and many
    compute the same batches. Rules need the whole model on every rank. `check` is called before every batch, as often
    on every rank; what it raises ends the scoring.
    """
    order = sorted(range(len(requests)), key=lambda index: -sum(map(len, requests[index])))
    batches = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
    mine = range(world.rank, len(batches), world.size)
    found: dict[int, list[Score]] = {}
    with (
        autocast,
        progress_bar(total=len(batches), unit="batch", desc="scoring", disable=not progress, leave=False) as bar,
    ):
        for turn in range(-(-len(batches) // world.size)):
            check()
            # A rank without a batch left runs one that does not count: under FSDP the others need it.
            batch = batches[mine[turn] if turn < len(mine) else 0]
            scores = score_batch(model, [requests[index] for index in batch], settings)
            if turn < len(mine):
                found |= zip(batch, scores, strict=True)
            bar.update(world.size)
    for part in world.ranks.gather(found):
        found |= part
    return [[found[index][number] for index in range(len(requests))] for number in range(len(settings))]


# Every batch has another shape, and blocks that training compiled would be compiled for each of them.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def score_batch(
    model: RecurrentDepthTransformer, requests: Sequence[Request], settings: Sequence[DepthSetting]
) -> list[list[Score]]:
    """For each request its score at every setting, computed as one batch."""
    lengths = [len(context) + len(continuation) - 1 for context, continuation in requests]
    # Padding stands on the right, where no token sees it.
    ids = torch.zeros(len(requests), max(lengths), dtype=torch.int64)
    targets, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids, dtype=torch.bool)
    for row, (length, (context, continuation)) in enumerate(zip(lengths, requests, strict=True)):
        ids[row, :length] = torch.tensor([*context, *continuation[:-1]])
        targets[row, len(context) - 1 : length] = torch.tensor(continuation)
        mask[row, :length] = True
    device = model.embedding.weight.device
    ids, targets, mask = ids.to(device), targets.to(device), mask.to(device)
    by_setting = list(_measured(model, ids, targets, mask, settings))
    return [list(scores) for scores in zip(*by_setting, strict=True)]


def _measured(
    model: RecurrentDepthTransformer, ids: Tensor, targets: Tensor, mask: Tensor, settings: Sequence[DepthSetting]
) -> Iterator[list[Score]]:
    """The scores of a batch's rows, for one setting after the other."""
    alike = sorted({setting.loops for setting in settings if setting.rule is None})
    readouts = model.read_depths(ids, targets, alike, judged=True) if alike else []
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
            found = model.extend(ids, cache, mask=mask, loops=setting.loops, halting=rule, logits="all")
            losses = F.cross_entropy(found.logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
            right, loops = found.logits.argmax(-1) == targets, found.loops.sum(1)
        greedy = (right | (targets == IGNORE_INDEX)).all(1)
        numbers = torch.stack((-losses.double().sum(1), greedy.double(), loops / counts), dim=1)
        yield [Score(likelihood, bool(all_right), depth) for likelihood, all_right, depth in numbers.tolist()]
