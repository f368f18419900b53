"""Sections of a configuration about data: validation, filters, and reasoning tasks."""

from collections.abc import Iterator
from math import factorial, inf
from typing import Annotated, Literal

from pydantic import Field

from mythos.model.config import PositiveInt, Section, padded_vocab_size

MOST_TOLD = 64
"""Numbers of hops that have a token of their own where the text tells the number."""

Size = Annotated[int, Field(ge=2, le=200)]


class ValidationConfig(Section):
    """Documents that are held out of training and that validation loss is measured on."""

    path: str | list[str] | None = None
    """Files of validation documents (glob or list of globs); null = hold out a share of the corpus by content hash."""
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of documents held out by content hash when path is null."""


class FilterConfig(Section):
    """What a column must hold for its document to be used; a null never passes."""

    min: float | None = None
    """Smallest number that passes."""
    max: float | None = None
    """Largest number that passes."""
    one_of: list[str | float | bool] | None = None
    """Values that pass."""


class TaskConfig(Section):
    """A task whose difficulty is a number of sequential steps; sequences are made on the way, from the run's seed."""

    name: Literal["hops", "mano", "permutations", "addition"] = "hops"
    """hops = follow a random permutation, given as pairs in the text, so many times from a symbol on; mano = value of a
    prefix expression of so many operations; permutations = product of so many elements of a group; addition = sum of so
    many numbers."""
    difficulty: tuple[PositiveInt, PositiveInt] = (1, 5)
    """Fewest and most steps of a training sequence; all between are equally frequent."""
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training over which the most steps rise evenly from the fewest on; 0 = all from the first step."""
    tell: Literal["nothing", "number", "marks"] = "nothing"
    """hops: how the text says the number of hops. nothing = only the number of loops does (depth.follow); number = a
    token of its own for each number, before the symbol; marks = one mark a hop, after the symbol, the answer being
    asked for at the last one. In the other tasks the text shows it in any case."""
    symbols: Size = 12
    """hops: symbols that are permuted."""
    queries: PositiveInt = 1
    """Questions in a sequence, so that it teaches more: in hops different symbols to start from, in permutations and
    addition words and sums one after another; in mano one."""
    ask: Literal["end", "steps", "windows"] = "end"
    """permutations, addition, hops told by marks: end = the result of all elements, numbers or hops; steps = also that
    of the first, of the first two, and so on, so that every loop has to take a step and to leave those before as they
    are. Reports ask for the end. windows = permutations without words: at each of the last `queries` elements the
    product of as many as the difficulty, which, as in hops, the number of loops alone tells (depth.follow)."""
    modulus: Size = 23
    """mano: numbers are 0..modulus - 1."""
    group: Literal["S3", "S5"] = "S3"
    """permutations: the symmetric group on 3 or 5 points, of 6 or 120 elements."""
    digits: Annotated[int, Field(ge=1, le=9)] = 2
    """addition: digits of every number; the sum is asked for modulo 10^digits."""

    def targets(self, difficulty: int) -> int:
        """Tokens that are asked for in a sequence of this difficulty."""
        answers = self.queries * (difficulty if self.ask == "steps" else 1)
        return answers * (self.digits if self.name == "addition" else 1)

    @property
    def elements(self) -> int:
        """permutations: elements of the group."""
        return factorial(int(self.group[1]))

    @property
    def vocabulary(self) -> int:
        """Token ids, the one that fills up sequences included."""
        if self.name == "hops":
            return 1 + self.symbols + self.symbols**2 + {"nothing": 0, "number": MOST_TOLD, "marks": 1}[self.tell]
        return {"mano": 5 + self.modulus, "permutations": 2 + self.elements, "addition": 12}[self.name]

    @property
    def hardest(self) -> float:
        """The most steps that a text can ask for."""
        return MOST_TOLD if self.tell == "number" else inf

    def length(self, difficulty: int) -> int:
        """Tokens of the shortest sequence that holds this difficulty.

        In permutations and addition with one in front of the first question: where a step is to look at the token
        before, none may be without, or the longest questions alone would begin a sequence.
        """
        return {
            "hops": self.symbols + self.queries * (1 + difficulty * (self.tell == "marks")) + (self.tell == "number"),
            "mano": 2 * difficulty + 2,
            "permutations": 1 + self.queries * (1 + difficulty) if self.ask != "windows" else self.queries + difficulty,
            "addition": 1 + self.queries * (1 + self.digits * difficulty),
        }[self.name]


def task_contradictions(
    task: TaskConfig, sequence_length: int, vocab_size: int | str, follow: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the paths and the explanation of all values of a run on data.task that cannot hold together.

    `follow` is depth.follow.
    """
    low, high = task.difficulty
    if low > high:
        yield ("data.task.difficulty",), f"got [{low}, {high}]; the fewest steps must not exceed the most"
    elif sequence_length < task.length(high):
        given = f"got {sequence_length}, and {task.name} of difficulty {high} takes {task.length(high)} tokens"
        yield ("data.sequence_length", "data.task.difficulty"), f"{given}; raise the first or lower the second"
    if task.name == "hops" and task.tell == "nothing" and follow == "none" and low < high:
        rule = "nothing says how many hops to follow; set the first to number or marks"
        rule += ", or, where there are loops, the second to difficulty"
        yield ("data.task.tell", "depth.follow"), f"got nothing and none; {rule}"
    if high > task.hardest:
        rule = f"only numbers up to {task.hardest} have a token of their own"
        yield ("data.task.tell", "data.task.difficulty"), f"got {task.tell} and [{low}, {high}]; {rule}"
    if task.name == "hops" and task.queries > task.symbols:
        given = f"got {task.queries} and {task.symbols}"
        yield ("data.task.queries", "data.task.symbols"), f"{given}; there are only so many symbols to start from"
    if task.ask == "steps" and not (task.name in ("permutations", "addition") or task.tell == "marks"):
        rule = "the steps of permutations and addition can be asked for, and those of hops that marks tell"
        yield ("data.task.name", "data.task.ask"), f"got {task.name} and steps; {rule}"
    if task.ask == "windows" and task.name != "permutations":
        yield ("data.task.name", "data.task.ask"), f"got {task.name} and windows; these are for permutations only"
    if task.ask == "windows" and follow == "none" and low < high:
        rule = "nothing says how many elements count; set the first to end or steps"
        rule += ", or, where there are loops, the second to difficulty"
        yield ("data.task.ask", "depth.follow"), f"got windows and none; {rule}"
    if task.name == "mano" and task.queries > 1:
        yield ("data.task.name", "data.task.queries"), f"got mano and {task.queries}; a sequence holds one expression"
    if isinstance(vocab_size, int) and padded_vocab_size(vocab_size) < task.vocabulary:
        rule = "the model needs a row for every token id; set the first to auto"
        yield ("model.vocab_size", "data.task.name"), f"got {vocab_size} and a task of {task.vocabulary} tokens; {rule}"
    used_by = {"tell": "hops", "symbols": "hops", "modulus": "mano", "group": "permutations", "digits": "addition"}
    for name, of in used_by.items():
        value = getattr(task, name)
        if task.name != of and value != TaskConfig.model_fields[name].default:
            rule = f"{name} is for the task {of} only"
            yield ("data.task.name", f"data.task.{name}"), f"got {task.name} and {value}; {rule}"
