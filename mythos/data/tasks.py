"""Generated sequences of reasoning tasks, whose answers take a known number of sequential steps.

A sequence is a function of a key alone. All sequences of a call are generated at once, in NumPy. Token 0 is padding and
never a target.

Shape suffixes: R rows (sequences), L tokens and Q queries of a sequence, N symbols, W tokens of an expression.
"""

from collections.abc import Sequence
from functools import cache
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.config.data import FACT_FIELDS, TREE_FIELDS, TaskConfig
from mythos.data.difficulty import slot_difficulties
from mythos.data.facts import Split, fact_graph
from mythos.data.random_bits import Draws, sequence_keys
from mythos.data.stream import Batch, Streams
from mythos.errors import MythosError
from mythos.model import IGNORE_INDEX

FORMS = {"trees": 2}
"""Number of the form of a task's text, for tasks whose text has changed. Checkpoints of another form are refused."""


class Sequences(NamedTuple):
    """Sequences of a task.

    Attributes:
        inputs: int32 (rows, length).
        targets: int32 (rows, length): the answer at positions that are asked for one, -100 elsewhere.
    """

    inputs: np.ndarray
    targets: np.ndarray


def make_sequences(
    task: TaskConfig, keys: np.ndarray, difficulty: int, length: int, split: Split = "train"
) -> Sequences:
    """Generate one sequence for each key.

    Args:
        task: the task.
        keys: uint64 (rows,).
        difficulty: number of sequential steps, at least 1.
        length: tokens of a sequence. Longer than needed, it is padded at the end. In permutations and addition, whose
            steps follow one another in the text, it is filled with random tokens of the task before and after the
            questions instead, a random number of each: the number before a question must not reveal its difficulty.
        split: facts: which questions. The questions of other tasks are drawn anew for every sequence.

    Raises:
        ValueError: the text cannot ask for this difficulty, or does not fit the length.
    """
    if not 1 <= difficulty <= task.hardest:
        raise ValueError(f"{task.name} of difficulty {difficulty}: it can be from 1 to {task.hardest}")
    if length < task.length(difficulty):
        raise ValueError(
            f"{task.name} of difficulty {difficulty} in {length} tokens: it takes {task.length(difficulty)}"
        )
    draws = Draws(keys)
    inputs_RL = np.zeros((len(keys), length), np.int32)
    targets_RL = np.full((len(keys), length), IGNORE_INDEX, np.int32)
    if task.name == "facts":
        _facts(task, draws, difficulty, inputs_RL, targets_RL, split)
        return Sequences(inputs_RL, targets_RL)
    _GENERATORS[task.name](task, draws, difficulty, inputs_RL, targets_RL)
    if task.name in ("permutations", "addition"):
        # The questions are at the end: rotate by a random number of the filling tokens before them.
        moved_R1 = draws.integers(length - task.length(difficulty) + 1, 1)
        order_RL = (np.arange(length) + moved_R1) % length
        inputs_RL, targets_RL = (np.take_along_axis(array, order_RL, axis=1) for array in (inputs_RL, targets_RL))
    return Sequences(inputs_RL, targets_RL)


def _hops(task: TaskConfig, draws: Draws, difficulty: int, inputs_RL: np.ndarray, targets_RL: np.ndarray) -> None:
    """Follow a random permutation: its pairs (symbol, image), one token each, in random order, then the queries.

    Before the queries there may be a token for the number of hops (`tell: number`), or after each query one mark per
    hop (`tell: marks`). Tokens: 1.. symbols, then pairs, then marks or numbers.
    """
    size, symbol = task.symbols, 1
    pair = symbol + size
    marker = pair + size**2
    image_RN = draws.permutations(size)
    order_RN = draws.permutations(size)
    start_RQ = draws.permutations(size)[:, : task.queries]
    inputs_RL[:, :size] = pair + order_RN * size + np.take_along_axis(image_RN, order_RN, axis=1)
    end = size
    if task.tell == "number":
        inputs_RL[:, end] = marker + difficulty - 1
        end += 1
    # A query has 1 token and, with marks, one more per hop. The last of these is answered, or (`ask: steps`) each mark.
    step = 1 + difficulty * (task.tell == "marks")
    inputs_RL[:, end : end + task.queries * step] = marker
    inputs_RL[:, end : end + task.queries * step : step] = symbol + start_RQ
    reached_RQ = start_RQ
    for hop in range(1, difficulty + 1):
        reached_RQ = np.take_along_axis(image_RN, reached_RQ, axis=1)
        if hop == difficulty or task.ask == "steps":
            answered = end + min(hop, step - 1)
            targets_RL[:, answered : end + task.queries * step : step] = symbol + reached_RQ


def _mano(task: TaskConfig, draws: Draws, difficulty: int, inputs_RL: np.ndarray, targets_RL: np.ndarray) -> None:
    """Evaluate a random prefix expression of + - *, followed by the token = that asks for its value.

    After Mano of the Physics of Language Models. Tokens: numbers from 1, then + - * and =. The operations below each
    operation are split between its operands uniformly at random.
    """
    rows, width = len(inputs_RL), 2 * difficulty + 1
    number, operation = 1, 1 + task.modulus
    values_RW = draws.integers(task.modulus, width)
    operations_RW = draws.integers(3, width)
    splits_RW = draws.bits(width)
    row_R = np.arange(rows)
    # Left to right: a stack of the open operands, each with the number of operations still to be written in it.
    stack, top_R = np.zeros((rows, width + 1), np.int64), np.zeros(rows, np.int64)
    stack[:, 0] = difficulty
    is_operation_RW = np.zeros((rows, width), bool)
    for place in range(width):
        left_R = stack[row_R, top_R]
        inner_R = left_R > 0
        is_operation_RW[:, place] = inner_R
        first_R = (splits_RW[:, place] % np.maximum(left_R, 1).astype(np.uint64)).astype(np.int64)
        stack[row_R, top_R] = np.where(inner_R, left_R - 1 - first_R, 0)  # of the second operand; 0 after a number
        top_R += np.where(inner_R, 1, -1)
        stack[row_R[inner_R], top_R[inner_R]] = first_R[inner_R]
    inputs_RL[:, :width] = np.where(is_operation_RW, operation + operations_RW, number + values_RW)
    # Right to left: a stack of the values of complete operands.
    results, depth_R = np.zeros((rows, width + 1), np.int64), np.zeros(rows, np.int64)
    for place in reversed(range(width)):
        inner_R = is_operation_RW[:, place]
        a_R, b_R = results[row_R, depth_R - 1], results[row_R, depth_R - 2]
        result_R = np.choose(operations_RW[:, place], [a_R + b_R, a_R - b_R, a_R * b_R]) % task.modulus
        depth_R += np.where(inner_R, -1, 1)
        results[row_R, depth_R - 1] = np.where(inner_R, result_R, values_RW[:, place])
    inputs_RL[:, width] = operation + 3
    targets_RL[:, width] = number + results[:, 0]


def _permutations(
    task: TaskConfig, draws: Draws, difficulty: int, inputs_RL: np.ndarray, targets_RL: np.ndarray
) -> None:
    """Multiply elements of a symmetric group: random elements as filling, then words, each a begin token and elements.

    The target is the product of each word, at its end, or (`ask: steps`) that of each of its prefixes. With `ask:
    windows` there are elements only, and the target at each of the last `queries` elements is the product of the
    `difficulty` elements up to it. With `letters` only some elements are in the text. Tokens: elements from 1, then the
    begin token. The product of g and h is g first, then h.
    """
    element, begin = 1, 1 + task.elements
    letters = text_elements(task)
    inputs_RL[:] = element + letters[draws.integers(len(letters), inputs_RL.shape[1])]
    table = multiplication_table(int(task.group[1]))
    if task.ask == "windows":
        windows = np.lib.stride_tricks.sliding_window_view(inputs_RL - element, difficulty, axis=1)
        windows = windows[:, -task.queries :]  # (R, Q, difficulty)
        product_RQ = np.zeros(windows.shape[:2], np.int64)  # element 0 is the identity
        for place in range(difficulty):
            product_RQ = table[product_RQ, windows[:, :, place]]
        targets_RL[:, -task.queries :] = element + product_RQ
        return
    words, answers = _parts(inputs_RL, task.queries, difficulty), _parts(targets_RL, task.queries, difficulty)
    words[:, :, 0] = begin
    product_RQ = np.zeros(words.shape[:2], np.int64)
    for place in range(1, difficulty + 1):
        product_RQ = table[product_RQ, words[:, :, place] - element]
        if place == difficulty or task.ask == "steps":
            answers[:, :, place] = element + product_RQ


def _parts(sequences_RL: np.ndarray, count: int, size: int) -> np.ndarray:
    """The last tokens of every sequence as `count` parts of 1 + size tokens: a view (rows, count, 1 + size)."""
    return sequences_RL[:, sequences_RL.shape[1] - count * (1 + size) :].reshape(-1, count, 1 + size)


def text_elements(task: TaskConfig) -> np.ndarray:
    """The elements of the group that are in a text of permutations: int64, the same ones in every run."""
    if task.letters is None:
        return np.arange(task.elements)
    order = Draws(sequence_keys(f"letters/{task.group}", np.arange(1))).permutations(task.elements)
    return np.sort(order[0, : task.letters])


@cache
def multiplication_table(points: int) -> np.ndarray:
    """Products in the symmetric group, elements in lexicographic order: int64 (n!, n!), [g, h] being g, then h."""
    elements = list(permutations(range(points)))
    index = {element: number for number, element in enumerate(elements)}
    return np.array([[index[tuple(h[g[point]] for point in range(points))] for h in elements] for g in elements])


def _addition(task: TaskConfig, draws: Draws, difficulty: int, inputs_RL: np.ndarray, targets_RL: np.ndarray) -> None:
    """Add numbers: random digits as filling, then sums, each a begin token and its numbers, least digit first.

    The targets are the digits of the sum modulo 10^digits, at the digits of the last number, or (`ask: steps`) those of
    the sum so far at the digits of each number. With `ask: windows` every number has a begin token, and the targets at
    each of the last `queries` numbers are the digits of the sum of the `difficulty` numbers up to it. Tokens: digits
    from 1, then the begin token.
    """
    digit, begin, width = 1, 11, task.digits
    inputs_RL[:] = digit + draws.integers(10, inputs_RL.shape[1])
    powers = 10 ** np.arange(width)
    if task.ask == "windows":
        count = task.queries + difficulty
        numbers, answers = (_parts(array, count, width) for array in (inputs_RL, targets_RL))
        numbers[:, :, 0] = begin
        values_RN = (numbers[:, :, 1:] - digit) @ powers
        windows = np.lib.stride_tricks.sliding_window_view(values_RN, difficulty, axis=1)
        totals_RQ = windows[:, -task.queries :].sum(-1)
        answers[:, -task.queries :, 1:] = digit + totals_RQ[..., None] // powers % 10
        return
    sums, answers = (_parts(array, task.queries, width * difficulty) for array in (inputs_RL, targets_RL))
    sums[:, :, 0] = begin
    # (R, Q, difficulty): the sum of the numbers up to each.
    totals = ((sums[:, :, 1:] - digit).reshape(-1, task.queries, difficulty, width) @ powers).cumsum(-1)
    digits = (digit + totals[..., None] // powers % 10).reshape(-1, task.queries, difficulty * width)
    asked = digits.shape[-1] if task.ask == "steps" else width
    answers[:, :, -asked:] = digits[:, :, -asked:]


def _facts(
    task: TaskConfig, draws: Draws, difficulty: int, inputs_RL: np.ndarray, targets_RL: np.ndarray, split: Split
) -> None:
    """Ask about a graph of facts: each question is an entity and relations, answered at the last relation.

    Tokens: entities from 1, then relations. The answers are never in the text. Facts take one relation; of the longer
    questions the split says which.
    """
    chains_NC, answers_N = fact_graph(task).questions(difficulty, split)
    chosen_RQ = draws.integers(len(chains_NC), task.queries)
    end = task.queries * (1 + difficulty)
    tokens_NC = 1 + chains_NC
    tokens_NC[:, 1:] += task.entities
    inputs_RL[:, :end] = tokens_NC[chosen_RQ].reshape(len(inputs_RL), end)
    targets_RL[:, difficulty : end : 1 + difficulty] = 1 + answers_N[chosen_RQ]


def _trees(task: TaskConfig, draws: Draws, difficulty: int, inputs_RL: np.ndarray, targets_RL: np.ndarray) -> None:
    """List the edges of two trees in random order, one token each, then questions: two nodes and a start.

    One of the two nodes is `difficulty` edges below the start. The other is in the same level of either tree, but not
    below the start. The target, at the start, is the first of these. Every inner node has `branches` children, and is a
    start if the trees are deep enough below it. Each level has node tokens of its own: 1 and 2 are the roots. Tokens:
    nodes from 1, then pairs (parent, child). After the graphs of arXiv 2412.06769.
    """
    children, half, size = task.branches, task.nodes // 2, task.nodes
    begin = np.array([(children**level - 1) // (children - 1) for level in range(task.levels + 1)])
    # Labels by place: first the places of one tree, level by level, then those of the other.
    label_RN = np.empty((len(inputs_RL), size), np.int64)
    for level, first in enumerate(begin):
        order = 2 * first + draws.permutations(2 * children**level)
        label_RN[:, first : first + children**level], label_RN[:, half + first : half + first + children**level] = (
            np.split(order, 2, axis=1)
        )
    below = np.arange(1, half)
    child, parent = (np.concatenate([places, half + places]) for places in (below, (below - 1) // children))
    edges = 1 + size + label_RN[:, parent] * size + label_RN[:, child]
    start = len(child)  # of the questions
    inputs_RL[:, :start] = np.take_along_axis(edges, draws.permutations(start), axis=1)

    depth_S = np.repeat(np.arange(task.levels), 2 * children ** np.arange(task.levels))
    index_S = np.arange(len(depth_S)) - 2 * begin[depth_S]  # in both trees' part of the level
    possible = np.flatnonzero(depth_S + difficulty <= task.levels)
    start_RQ = possible[draws.integers(len(possible), task.queries)]
    level_RQ, index_RQ = depth_S[start_RQ] + difficulty, index_S[start_RQ]

    def place(level: np.ndarray, index: np.ndarray) -> np.ndarray:
        width = children**level
        return half * (index // width) + begin[level] + index % width

    reached = children**difficulty
    first_RQ = index_RQ * reached
    # Skip those below the start, so that the others of the level are equally likely.
    decoy_RQ = (draws.bits(task.queries) % (2 * children**level_RQ - reached).astype(np.uint64)).astype(np.int64)
    decoy_RQ += reached * (decoy_RQ >= first_RQ)
    right_RQ = place(level_RQ, first_RQ + draws.integers(reached, task.queries))
    pair_RQ2 = np.stack([right_RQ, place(level_RQ, decoy_RQ)], axis=-1)
    turned_RQ1 = draws.integers(2, task.queries).astype(bool)[..., None]
    question_RQ3 = np.concatenate(
        [np.where(turned_RQ1, pair_RQ2[..., ::-1], pair_RQ2), place(depth_S[start_RQ], index_RQ)[..., None]], axis=-1
    )
    end = start + 3 * task.queries
    inputs_RL[:, start:end] = 1 + np.take_along_axis(label_RN, question_RQ3.reshape(len(label_RN), -1), axis=1)
    targets_RL[:, start + 2 : end : 3] = 1 + np.take_along_axis(label_RN, right_RQ, axis=1)


_GENERATORS = {"hops": _hops, "mano": _mano, "permutations": _permutations, "addition": _addition, "trees": _trees}


class TaskSet(NamedTuple):
    """Sequences of a task with their difficulties.

    Attributes:
        ids: int64 (n, length).
        targets: int64 (n, length), -100 for positions without a target.
        difficulties: int64 (n,).
    """

    ids: Tensor
    targets: Tensor
    difficulties: Tensor


def task_set(
    task: TaskConfig, difficulties: Sequence[int], count: int, length: int, name: str, split: Split = "train"
) -> TaskSet:
    """Generate ``count`` sequences of each of the difficulties, in their order: a function of the arguments alone.

    Args:
        task: the task.
        difficulties: may repeat.
        count: sequences of each entry.
        length: tokens of a sequence.
        name: sets of different names are drawn independently, and independently of training. (In a small task equal
            sequences may still come up by chance.)
        split: facts: which questions.
    """
    parts = [
        make_sequences(task, sequence_keys(f"{name}/{index}", np.arange(count)), difficulty, length, split)
        for index, difficulty in enumerate(difficulties)
    ]
    return TaskSet(
        torch.from_numpy(np.concatenate([sequences.inputs for sequences in parts]).astype(np.int64)),
        torch.from_numpy(np.concatenate([sequences.targets for sequences in parts]).astype(np.int64)),
        torch.tensor(difficulties).repeat_interleave(count),
    )


class TaskStreams(Streams):
    """Generated sequences of a task.

    Sequence n of stream s is a function of (task, seed, n, s); its difficulty is that of slot n % slots of step
    n // slots (:func:`slot_difficulties`).

    Args:
        task: the task.
        slots: sequences of every stream in a step.
        steps: steps of the schedule; the ramp of the difficulty is a share of them.

    The others are those of :class:`Streams`.
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
        super().__init__(streams, sequence_length, seed, rank, world_size)
        self.task = task
        self.slots = slots
        self.steps = steps
        self._consumed = 0
        # Without fields of newer tasks that checkpoints of earlier versions lack, unless the task uses them.
        newer = {"facts": FACT_FIELDS, "trees": TREE_FIELDS}
        unused = {field for name, fields in newer.items() if name != task.name for field in fields}
        if task.letters is None:
            unused.add("letters")
        self.identity = {
            "task": task.model_dump(mode="json", exclude=unused),
            "streams": streams,
            "slots": slots,
            "sequence_length": sequence_length,
            "seed": seed,
        }
        if form := FORMS.get(task.name):
            self.identity["form"] = form

    def next_ids(self, slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Consume a step: int32 inputs and targets (rows, 2, L), and int64 rows (rows,)."""
        assert slots == self.slots
        step, first = divmod(self._consumed, slots)
        assert first == 0
        self._consumed += slots
        batch = []
        for slot, difficulty in enumerate(slot_difficulties(self.task, slots, self.seed, step, self.steps)):
            numbers = (step * slots + slot) * self.streams + self.indices
            keys = sequence_keys(f"train/{self.seed}", numbers)
            batch.append(np.stack(make_sequences(self.task, keys, difficulty, self.sequence_length), axis=1))
        return np.concatenate(batch), self.global_rows(slots)

    def as_batch(self, ids: Tensor, rows: Tensor) -> Batch:
        """Inputs and targets (rows, 2, L) as a batch."""
        inputs, targets = ids.unbind(1)
        return Batch(F.pad(inputs, (0, 1)), None, rows, targets)

    def state_dict(self) -> dict[str, Any]:
        """Position after the last :meth:`next_batch`; plain JSON that ``merge_states`` joins."""
        consumed = {str(stream): self._consumed for stream in self.indices.tolist()}
        return {**self.identity, "sequences": consumed, "positions": {}, "skipped": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the batch after which ``state`` was saved.

        Raises MythosError if the state belongs to another task, seed or batch size, or lacks some of these streams. The
        sequences of a step depend on its number, so `data.on_mismatch=restart` cannot apply here.
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
        self.check_streams(state)
        self._consumed = state["sequences"][str(self.indices[0])]
