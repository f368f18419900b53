"""Multiple choice from local files, as lm-evaluation-harness scores it."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from mythos.data.tokenizer import Tokenizer
from mythos.distributed.ranks import World
from mythos.errors import MythosError
from mythos.evaluation.continuations import DepthSetting, Request, Score, encode_requests, score_requests
from mythos.files.text import parse_json, read_text, unusable_text
from mythos.model.rdt import RecurrentDepthTransformer

logger = logging.getLogger(__name__)

MOST_BYTES = 2**30
"""Of a file of questions."""
EXAMPLE = '{"query": "Two and two make", "choices": ["four", "five"], "gold": 0}'


class Question(NamedTuple):
    """A question and its choices, of which one is right."""

    query: str
    choices: list[str]
    gold: int
    """Number of the right choice, from 0."""


@dataclass(frozen=True)
class ChoiceTask:
    """Questions of one file."""

    name: str
    """The file's, without its extension."""
    questions: list[Question]


def read_tasks(paths: Sequence[str], *, what: str, limit: int | None = None) -> list[ChoiceTask]:
    """Read files of questions, one JSON object a line with the keys query, choices and gold; others are ignored.

    Args:
        paths: files named *.jsonl.
        what: the field or option that names them, for messages.
        limit: most questions of each, from its beginning.

    Raises:
        MythosError: a file that cannot be read or has no questions, a line that is no question, with its number, or
            two files of one name.
    """
    names = Counter(Path(path).stem for path in paths)
    for path in paths:
        if names[Path(path).stem] > 1:
            raise MythosError(
                f"{what}: two files are called {Path(path).stem}, as their scores would be; rename one of them"
            )
    return [ChoiceTask(Path(path).stem, _read(path, what, limit)) for path in paths]


def _read(path: str, what: str, limit: int | None) -> list[Question]:
    try:
        lines = read_text(path, MOST_BYTES).split("\n")
    except (OSError, ValueError) as error:
        raise MythosError(f"{what}: {path} cannot be read: {error}. Give a .jsonl file of questions.") from error
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and (limit is None or len(questions) < limit):
            try:
                questions.append(_question(parse_json(line)))
            except ValueError as error:
                raise MythosError(f"{what}: {path}, line {number}: {error}. Give lines such as {EXAMPLE}") from error
    if not questions:
        raise MythosError(f"{what}: {path} has no questions in it. Give lines such as {EXAMPLE}")
    return questions


def _question(values: Any) -> Question:
    """Raises ValueError for what is no question."""
    if not isinstance(values, dict):
        raise ValueError(f"got {type(values).__name__}, not an object")
    missing = [name for name in Question._fields if name not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing")
    query, choices, gold = (values[name] for name in Question._fields)
    if unusable_text([query, choices]):
        raise ValueError("query, choices: got text with the character NUL or half of a surrogate pair")
    if not isinstance(query, str):
        raise ValueError(f"query: got {query!r}, not text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"choices: got {choices!r}, not a list of at least two texts")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"gold: got {gold!r}, not a number from 0 to {len(choices) - 1}")
    return Question(query, choices, gold)


@dataclass(frozen=True)
class EncodedTask:
    """A task as requests for likelihoods: all choices of the first question, then of the next, ..."""

    task: ChoiceTask
    requests: list[Request]


def encode_task(task: ChoiceTask, tokenizer: Tokenizer, context_length: int) -> EncodedTask:
    """Make requests of questions: a choice follows its query after a space.

    Queries that do not fit in the context lose their beginning, which is told as a warning.

    Raises MythosError for a choice that alone does not fit.
    """
    texts = [(question.query, f" {choice}") for question in task.questions for choice in question.choices]
    try:
        requests, cut = encode_requests(tokenizer, texts, context_length)
    except MythosError as error:
        raise MythosError(f"{task.name}: {error}") from error
    if cut:
        told = f"{cut} of {len(texts)} prompts do not fit in the context of {context_length} tokens"
        logger.warning("%s: %s and lose their beginning", task.name, told)
    return EncodedTask(task, requests)


class ChoiceScores(NamedTuple):
    """How often the likeliest choice is the right one."""

    acc: float
    acc_norm: float
    """With likelihoods divided by the characters of the choice."""
    loops: float
    """Of a position, on average over the choices."""


def choice_scores(task: ChoiceTask, scores: Sequence[Score]) -> ChoiceScores:
    """Accuracies from the scores of all choices. Of equal likelihoods the first counts, as in the harness.

    NaN where a likelihood is NaN, of which none is the largest.
    """
    ends = list(accumulate(len(question.choices) for question in task.questions))
    right = normalised = 0.0
    for question, end in zip(task.questions, ends, strict=True):
        found = [score.log_likelihood for score in scores[end - len(question.choices) : end]]
        by_length = [likelihood / len(choice) for likelihood, choice in zip(found, question.choices, strict=True)]
        right += found.index(max(found)) == question.gold
        normalised += by_length.index(max(by_length)) == question.gold
    count = len(task.questions)
    if any(math.isnan(score.log_likelihood) for score in scores):
        right = normalised = math.nan
    return ChoiceScores(right / count, normalised / count, sum(score.loops for score in scores) / len(scores))


def choice_metrics(
    model: RecurrentDepthTransformer,
    tasks: Sequence[EncodedTask],
    *,
    depths: Sequence[int],
    micro_batch: int,
    world: World,
    autocast: AbstractContextManager[Any],
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """For metrics.jsonl: `val/<task>_acc@<loops>` and `val/<task>_acc_norm@<loops>` at each of `depths`.

    The questions are divided over the ranks, which all get the result. `check` is that of `score_requests`.
    """
    settings = [DepthSetting(loops) for loops in depths]
    metrics = {}
    for encoded in tasks:
        scored = score_requests(
            model, encoded.requests, settings, micro_batch=micro_batch, world=world, autocast=autocast, check=check
        )
        for setting, scores in zip(settings, scored, strict=True):
            found = choice_scores(encoded.task, scores)
            for name in ("acc", "acc_norm"):
                metrics[f"val/{encoded.task.name}_{name}@{setting.loops}"] = getattr(found, name)
    return metrics
