"""Multiple-choice questions from local files, scored as in lm-evaluation-harness."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from mythos.data.tokenizer import Tokenizer
from mythos.errors import MythosError
from mythos.evaluation.continuations import DepthSetting, Request, Score, encode_requests, score_requests
from mythos.evaluation.execution import Execution
from mythos.files.text import parse_json, read_text, unusable_text
from mythos.model.rdt import RecurrentDepthTransformer

logger = logging.getLogger(__name__)

MOST_BYTES = 2**30
"""Maximum size of a file of questions."""
EXAMPLE = '{"query": "Two and two make", "choices": ["four", "five"], "gold": 0}'


class Question(NamedTuple):
    """A question and its choices, one of which is right."""

    query: str
    choices: list[str]
    gold: int
    """Index of the right choice."""


@dataclass(frozen=True)
class ChoiceTask:
    """The questions of one file."""

    name: str
    """The file's name without its extension."""
    questions: list[Question]


def read_tasks(paths: Sequence[str], *, what: str, limit: int | None = None) -> list[ChoiceTask]:
    """Read files of questions: one JSON object per line with the keys query, choices and gold; others are ignored.

    `what` is the configuration field or option with the paths, for error messages. At most `limit` questions are read
    from the start of each file.

    Raises MythosError if a file cannot be read or has no questions, a line is not a question, or two files have the
    same name.
    """
    names = Counter(Path(path).stem for path in paths)
    for path in paths:
        if names[Path(path).stem] > 1:
            raise MythosError(
                f"{what}: two files have the name {Path(path).stem}, and their scores would too; rename one of them"
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
    """Raises ValueError if the values are no question."""
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
    """A task as requests for likelihoods: all choices of the first question, then of the second, and so on."""

    task: ChoiceTask
    requests: list[Request]


def encode_task(task: ChoiceTask, tokenizer: Tokenizer, context_length: int) -> EncodedTask:
    """Encode questions as requests; the continuation of a query is a space and the choice.

    A query that does not fit in the context loses its beginning, with a warning.

    Raises MythosError for a choice that does not fit by itself.
    """
    texts = [(question.query, f" {choice}") for question in task.questions for choice in question.choices]
    try:
        requests, cut = encode_requests(tokenizer, texts, context_length)
    except MythosError as error:
        raise MythosError(f"{task.name}: {error}") from error
    if cut:
        logger.warning(
            "%s: %d of %d prompts do not fit in the context of %d tokens and lose their beginning",
            *(task.name, cut, len(texts), context_length),
        )
    return EncodedTask(task, requests)


class ChoiceScores(NamedTuple):
    """How often the likeliest choice is right."""

    acc: float
    acc_norm: float
    """Accuracy with log-likelihoods divided by the number of characters of the choice."""
    loops: float
    """Mean loops of a position over the choices."""


def choice_scores(task: ChoiceTask, scores: Sequence[Score]) -> ChoiceScores:
    """Accuracies from the scores of all choices. Of equal likelihoods the first wins, as in the harness.

    NaN if any likelihood is NaN.
    """
    ends = list(accumulate(len(question.choices) for question in task.questions))
    right = normalised = 0.0
    for question, end in zip(task.questions, ends, strict=True):
        likelihoods = [score.log_likelihood for score in scores[end - len(question.choices) : end]]
        by_length = [likelihood / len(choice) for likelihood, choice in zip(likelihoods, question.choices, strict=True)]
        right += likelihoods.index(max(likelihoods)) == question.gold
        normalised += by_length.index(max(by_length)) == question.gold
    count = len(task.questions)
    if any(math.isnan(score.log_likelihood) for score in scores):
        right = normalised = math.nan
    return ChoiceScores(right / count, normalised / count, sum(score.loops for score in scores) / len(scores))


def choice_metrics(
    model: RecurrentDepthTransformer,
    tasks: Sequence[EncodedTask],
    execution: Execution,
    *,
    depths: Sequence[int],
) -> dict[str, float]:
    """For metrics.jsonl: `val/<task>_acc@<loops>` and `val/<task>_acc_norm@<loops>` at each of `depths`.

    Collective: the questions are divided over the ranks, and all get the result.
    """
    settings = [DepthSetting(loops) for loops in depths]
    metrics = {}
    for encoded in tasks:
        by_setting = score_requests(model, encoded.requests, settings, execution)
        for setting, scores in zip(settings, by_setting, strict=True):
            accuracies = choice_scores(encoded.task, scores)
            metrics[f"val/{encoded.task.name}_acc@{setting.loops}"] = accuracies.acc
            metrics[f"val/{encoded.task.name}_acc_norm@{setting.loops}"] = accuracies.acc_norm
    return metrics
