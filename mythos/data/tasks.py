"""Sequences of reasoning tasks, each a pure function of a key: their answers take a known number of sequential steps.

Token 0 fills up sequences and is never asked for. All sequences of a call are made at once, in NumPy.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.config.data import TaskConfig
from mythos.data.stream import Batch
from mythos.errors import MythosError
from mythos.model import IGNORE_INDEX

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Sequences(NamedTuple):
    """Sequences of a task.

    Attributes:
        inputs: int32 (rows, length).
        targets: int32 (rows, length): the answer where one is asked for, -100 elsewhere.
    """

    inputs: np.ndarray
    targets: np.ndarray


def mixed(values: np.ndarray) -> np.ndarray:
    """64 well-mixed bits of every value: uint64 to uint64 of the same shape (the finaliser of SplitMix64).

    Written out and not taken from a library's generator, whose sequence may change with its version: a run that resumes
    after an upgrade must go on with the same sequences.
    """
    with np.errstate(over="ignore"):
        values = values + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * _MIX[0]
        values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))


class Draws:
    """Independent random bits for every row, in the order in which they are asked for.

    Args:
        keys: uint64 (rows,); equal keys draw equally.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = mixed(keys)
        self._drawn = 0

    def bits(self, count: int) -> np.ndarray:
        """uint64 (rows, count)."""
        numbers = np.arange(self._drawn, self._drawn + count, dtype=np.uint64)
        self._drawn += count
        with np.errstate(over="ignore"):
            return mixed(self._keys[:, None] + numbers * _GOLDEN)

    def integers(self, below: int, count: int) -> np.ndarray:
        """Uniform 0..below - 1, int64 (rows, count)."""
        return (self.bits(count) % np.uint64(below)).astype(np.int64)

    def permutations(self, size: int) -> np.ndarray:
        """Uniform permutations of 0..size - 1, int64 (rows, size)."""
        return np.argsort(self.bits(size), axis=1, kind="stable")


def make_sequences(task: TaskConfig, keys: np.ndarray, difficulty: int, length: int) -> Sequences:
    """One sequence for each key.

    Args:
        task: what is asked for.
        keys: uint64 (rows,).
        difficulty: number of sequential steps, any from 1 on that ``length`` holds.
        length: tokens of a sequence; shorter ones are filled up at the end, or, where the steps follow one another in
            the text (permutations, addition), with tokens of the task before and after, as many of each as it happens:
            how much stands before a question must not tell its difficulty.

    Raises:
        ValueError: the text cannot ask for this difficulty, or the length does not hold it.
    """
    if not 1 <= difficulty <= task.hardest:
        raise ValueError(f"{task.name} of difficulty {difficulty}: it can be from 1 to {task.hardest}")
    if length < task.length(difficulty):
        raise ValueError(
            f"{task.name} of difficulty {difficulty} in {length} tokens: it takes {task.length(difficulty)}"
        )
    draws = Draws(keys)
    inputs = np.zeros((len(keys), length), np.int32)
    targets = np.full((len(keys), length), IGNORE_INDEX, np.int32)
    _MAKERS[task.name](task, draws, difficulty, inputs, targets)
    if task.name in ("permutations", "addition"):
        moved = draws.integers(length - task.length(difficulty) + 1, 1)  # from before the questions to behind them
        order = (np.arange(length) + moved) % length
        inputs, targets = (np.take_along_axis(array, order, axis=1) for array in (inputs, targets))
    return Sequences(inputs, targets)


def _hops(task: TaskConfig, draws: Draws, difficulty: int, inputs: np.ndarray, targets: np.ndarray) -> None:
    """Pairs of a symbol and its image, one token each, in random order; perhaps the number; the symbols to start from.

    Tokens: symbols from 1, pairs after them, then what tells the number.
    """
    size, symbol = task.symbols, 1
    pair = symbol + size
    told = pair + size**2
    image = draws.permutations(size)
    order = draws.permutations(size)
    start = draws.permutations(size)[:, : task.queries]
    inputs[:, :size] = pair + order * size + np.take_along_axis(image, order, axis=1)
    end = size
    if task.tell == "number":
        inputs[:, end] = told + difficulty - 1
        end += 1
    # A query and, where hops are told by marks, so many of them; the last of these tokens is answered, or each mark is.
    step = 1 + difficulty * (task.tell == "marks")
    inputs[:, end : end + task.queries * step] = told
    inputs[:, end : end + task.queries * step : step] = symbol + start
    reached = start
    for hop in range(1, difficulty + 1):
        reached = np.take_along_axis(image, reached, axis=1)
        if hop == difficulty or task.ask == "steps":
            answered = end + min(hop, step - 1)
            targets[:, answered : end + task.queries * step : step] = symbol + reached


def _mano(task: TaskConfig, draws: Draws, difficulty: int, inputs: np.ndarray, targets: np.ndarray) -> None:
    """A random prefix expression of + - *, then the token that asks for its value.

    After Mano of the Physics of Language Models. Tokens: numbers from 1, then + - * and =. Each operation splits those
    that are left evenly at random between its operands.
    """
    rows, width = len(inputs), 2 * difficulty + 1
    number, operation = 1, 1 + task.modulus
    values = draws.integers(task.modulus, width)
    operations = draws.integers(3, width)
    splits = draws.bits(width)
    row = np.arange(rows)
    # From the left: operations still to be written in each operand that is open.
    stack, top = np.zeros((rows, width + 1), np.int64), np.zeros(rows, np.int64)
    stack[:, 0] = difficulty
    is_operation = np.zeros((rows, width), bool)
    for place in range(width):
        left = stack[row, top]
        inner = left > 0
        is_operation[:, place] = inner
        first = (splits[:, place] % np.maximum(left, 1).astype(np.uint64)).astype(np.int64)
        stack[row, top] = np.where(inner, left - 1 - first, 0)  # the second operand, unless this one is complete
        top += np.where(inner, 1, -1)
        stack[row[inner], top[inner]] = first[inner]
    inputs[:, :width] = np.where(is_operation, operation + operations, number + values)
    # From the right: values of the operands that are complete.
    held, depth = np.zeros((rows, width + 1), np.int64), np.zeros(rows, np.int64)
    for place in reversed(range(width)):
        inner = is_operation[:, place]
        a, b = held[row, depth - 1], held[row, depth - 2]
        result = np.choose(operations[:, place], [a + b, a - b, a * b]) % task.modulus
        depth += np.where(inner, -1, 1)
        held[row, depth - 1] = np.where(inner, result, values[:, place])
    inputs[:, width] = operation + 3
    targets[:, width] = number + held[:, 0]


def _permutations(task: TaskConfig, draws: Draws, difficulty: int, inputs: np.ndarray, targets: np.ndarray) -> None:
    """Elements in front; words, each of a token that begins it and its elements.

    Asked for is the product of each word, at its end, or of each beginning of it too. As windows, there are elements
    only, and asked for is the product of as many as the difficulty at each of the last elements. Tokens: elements from
    1, then the beginning. The product of g and h is g first, then h.
    """
    element, begin = 1, 1 + task.elements
    inputs[:] = element + draws.integers(task.elements, inputs.shape[1])
    table = multiplication_table(int(task.group[1]))
    if task.ask == "windows":
        windows = np.lib.stride_tricks.sliding_window_view(inputs - element, difficulty, axis=1)[:, -task.queries :]
        product = np.zeros(windows.shape[:2], np.int64)  # element 0 is the identity
        for place in range(difficulty):
            product = table[product, windows[:, :, place]]
        targets[:, -task.queries :] = element + product
        return
    words, answers = _parts(inputs, task.queries, difficulty), _parts(targets, task.queries, difficulty)
    words[:, :, 0] = begin
    product = np.zeros(words.shape[:2], np.int64)
    for place in range(1, difficulty + 1):
        product = table[product, words[:, :, place] - element]
        if place == difficulty or task.ask == "steps":
            answers[:, :, place] = element + product


def _parts(sequences: np.ndarray, count: int, size: int) -> np.ndarray:
    """The ends of the sequences as so many parts of 1 + size tokens: a view (rows, count, 1 + size)."""
    return sequences[:, sequences.shape[1] - count * (1 + size) :].reshape(-1, count, 1 + size)


@cache
def multiplication_table(points: int) -> np.ndarray:
    """Products in the symmetric group, elements in lexicographic order: int64 (n!, n!), [g, h] being g, then h."""
    elements = list(permutations(range(points)))
    index = {element: number for number, element in enumerate(elements)}
    return np.array([[index[tuple(h[g[point]] for point in range(points))] for h in elements] for g in elements])


def _addition(task: TaskConfig, draws: Draws, difficulty: int, inputs: np.ndarray, targets: np.ndarray) -> None:
    """Digits in front; sums, each of a token that begins it and its numbers, the least digit first.

    Asked for are the digits of a sum modulo 10^digits, at those of its last number, or of the sum so far at those of
    each. Tokens: digits from 1, then the beginning.
    """
    digit, begin, width = 1, 11, task.digits
    inputs[:] = digit + draws.integers(10, inputs.shape[1])
    sums, answers = (_parts(array, task.queries, width * difficulty) for array in (inputs, targets))
    sums[:, :, 0] = begin
    powers = 10 ** np.arange(width)
    totals = ((sums[:, :, 1:] - digit).reshape(-1, task.queries, difficulty, width) @ powers).cumsum(-1)
    found = (digit + totals[..., None] // powers % 10).reshape(-1, task.queries, difficulty * width)
    asked = found.shape[-1] if task.ask == "steps" else width
    answers[:, :, -asked:] = found[:, :, -asked:]


_MAKERS = {"hops": _hops, "mano": _mano, "permutations": _permutations, "addition": _addition}


def hardest(task: TaskConfig, step: int, steps: int) -> int:
    """The highest difficulty that a step draws from; the ramp is a share of `steps`."""
    low, high = task.difficulty
    if step < task.ramp * steps:
        return low + int(step / (task.ramp * steps) * (high - low + 1))
    return high


def slot_difficulties(task: TaskConfig, slots: int, seed: int, step: int, steps: int) -> list[int]:
    """Difficulty of every slot of a step, shared by all streams: a function of the arguments alone.

    The ramp is a share of `steps`. The slots of a step are drawn by stratified sampling in random order, as depths are.
    """
    low, high = task.difficulty[0], hardest(task, step, steps)
    random = Random(f"difficulty/{seed}/{step}")
    order = sorted(range(slots), key=lambda _: random.random())
    return [low + int((stratum + random.random()) / slots * (high - low + 1)) for stratum in order]


class TaskSet(NamedTuple):
    """Sequences of a task with their difficulties.

    Attributes:
        ids: int64 (n, length).
        targets: int64 (n, length), -100 where nothing is asked for.
        difficulties: int64 (n,).
    """

    ids: Tensor
    targets: Tensor
    difficulties: Tensor


def task_set(task: TaskConfig, difficulties: Sequence[int], count: int, length: int, name: str) -> TaskSet:
    """``count`` sequences of each of the difficulties, in their order: a function of the arguments alone.

    Args:
        task: what is asked for.
        difficulties: those wanted; may repeat.
        count: sequences of each entry.
        length: tokens of a sequence.
        name: sets of another name are drawn independently, as are those of training (a small task repeats itself).
    """
    made = [
        make_sequences(task, sequence_keys(f"{name}/{index}", np.arange(count)), difficulty, length)
        for index, difficulty in enumerate(difficulties)
    ]
    return TaskSet(
        torch.from_numpy(np.concatenate([sequences.inputs for sequences in made]).astype(np.int64)),
        torch.from_numpy(np.concatenate([sequences.targets for sequences in made]).astype(np.int64)),
        torch.tensor(difficulties).repeat_interleave(count),
    )


def sequence_keys(name: str, numbers: np.ndarray) -> np.ndarray:
    """Keys of numbered sequences: uint64, as many as the numbers, other ones for every name."""
    base = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), "<u8")
    return mixed(base) + numbers.astype(np.uint64)


class TaskStreams:
    """Endless sequences of a task, the same global batches at every world size.

    Sequence n of stream s is a function of (task, seed, n, s); its difficulty is that of slot n % slots of step
    n // slots (:func:`slot_difficulties`). Stream i belongs to rank i % world_size, and shares are divided as
    :class:`mythos.data.stream.TokenStreams` divides them.

    Args:
        task: what is asked for.
        streams: number S of streams.
        slots: sequences of every stream in a step.
        steps: steps of the schedule, which the ramp of the difficulty is a share of.
        sequence_length: tokens of a sequence.
        seed: seed of the sequences.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        task: TaskConfig,
        *,
        streams: int,
        slots: int,
        steps: int,
        sequence_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.task = task
        self.streams = streams
        self.slots = slots
        self.steps = steps
        self.sequence_length = sequence_length
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._local = np.arange(rank, streams, world_size)
        self._consumed = 0
        self.identity = {
            "task": task.model_dump(mode="json"),
            "streams": streams,
            "slots": slots,
            "sequence_length": sequence_length,
            "seed": seed,
        }

    def share(self, worker: int, workers: int) -> "TaskStreams":
        """The streams of one of this rank's worker processes, at the position of these."""
        share = TaskStreams(
            self.task,
            streams=self.streams,
            slots=self.slots,
            steps=self.steps,
            sequence_length=self.sequence_length,
            seed=self.seed,
            rank=self.rank + worker * self.world_size,
            world_size=workers * self.world_size,
        )
        share.load_state_dict(self.state_dict())
        return share

    def next_ids(self, slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Consume a step: int32 inputs and targets (rows, 2, L), and int64 rows (rows,)."""
        assert slots == self.slots
        step, first = divmod(self._consumed, slots)
        assert first == 0
        self._consumed += slots
        made = []
        for slot, difficulty in enumerate(slot_difficulties(self.task, slots, self.seed, step, self.steps)):
            numbers = (step * slots + slot) * self.streams + self._local
            keys = sequence_keys(f"train/{self.seed}", numbers)
            made.append(np.stack(make_sequences(self.task, keys, difficulty, self.sequence_length), axis=1))
        rows = np.arange(slots)[:, None] * self.streams + self._local
        return np.concatenate(made), rows.reshape(-1)

    def next_batch(self, slots: int) -> Batch:
        """Consume a step of these streams: slots x streams / world_size rows."""
        return self.batch(*self.next_ids(slots))

    def batch(self, ids: np.ndarray, rows: np.ndarray) -> Batch:
        """What :meth:`next_ids` of these streams, or of their shares, returned, as a batch in the order of the rows."""
        order = np.argsort(rows, kind="stable")
        inputs, targets = torch.from_numpy(ids[order].astype(np.int64)).unbind(1)
        return Batch(F.pad(inputs, (0, 1)), None, torch.from_numpy(rows[order]), targets)

    def state_dict(self) -> dict[str, Any]:
        """Position after what :meth:`next_batch` has returned; plain JSON that ``merge_states`` joins."""
        consumed = {str(stream): self._consumed for stream in self._local.tolist()}
        return {**self.identity, "sequences": consumed, "positions": {}, "skipped": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the batch that ``state`` was taken after.

        Raises:
            MythosError: the state is of another task or seed, or of other batches, or it lacks some of these streams.
                What a step holds depends on its number, so there is no reading such data from its beginning.
        """
        different = [
            f"{name} was {state.get(name)}, is {value}"
            for name, value in self.identity.items()
            if state.get(name) != value
        ]
        if different:
            raise MythosError(
                f"data.task: the checkpoint's position is in another task: {'; '.join(different)}. Restore what the "
                "run was started with, or start a new run (another run.name)."
            )
        missing = [stream for stream in self._local.tolist() if str(stream) not in state["sequences"]]
        if missing:
            raise MythosError(
                f"data: the checkpoint has no position for streams {missing}; merge the state of every rank that saved."
            )
        self._consumed = state["sequences"][str(self._local[0])]
