"""Reasoning tasks against solvers that work on one sequence at a time, and their streams as data of a run."""

import hashlib
import json
import operator
from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from mythos.config.data import TaskConfig
from mythos.data.difficulty import slot_difficulties
from mythos.data.loader import Loader
from mythos.data.stream import count_skipped, merge_states
from mythos.data.tasks import Sequences, TaskStreams, make_sequences, multiplication_table, task_set
from mythos.errors import MythosError

ROWS = 64


def solve_hops(task: TaskConfig, ids: list[int], difficulty: int) -> dict[int, int]:
    """Answers by position."""
    n = task.symbols
    pairs = [token - 1 - n for token in ids[:n]]
    image = {pair // n: pair % n for pair in pairs}
    assert sorted(image) == sorted(image.values()) == list(range(n))
    rest = [token for token in ids[n:] if token]
    first = n
    marker = 1 + n + n * n
    if task.tell == "number":
        assert rest.pop(0) == marker + difficulty - 1
        first += 1
    step = 1
    if task.tell == "marks":
        step = 1 + difficulty
        for query in range(task.queries):
            assert rest[query * step + 1 : (query + 1) * step] == [marker] * difficulty
        first, rest = first + difficulty, rest[::step]
    assert len(rest) == len(set(rest)) == task.queries
    answers = {}
    for place, token in enumerate(rest):
        symbol, last = token - 1, first + place * step
        for left in reversed(range(difficulty)):
            symbol = image[symbol]
            if left == 0 or task.ask == "steps":
                answers[last - left] = symbol + 1
    return answers


def solve_mano(task: TaskConfig, ids: list[int], difficulty: int) -> dict[int, int]:
    words = "+-*="
    operators = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    end = 2 * difficulty + 1
    tokens = iter(ids[:end])
    operations = 0

    def value() -> int:
        nonlocal operations
        token = next(tokens) - 1
        if token < task.modulus:
            return token
        operations += 1
        left, right = value(), value()
        return operators[words[token - task.modulus]](left, right) % task.modulus

    answer = value()
    assert next(tokens, None) is None and operations == difficulty
    assert words[ids[end] - 1 - task.modulus] == "="
    return {end: answer + 1}


def parts(ids: list[int], count: int, size: int, begin: int) -> list[tuple[int, list[int]]]:
    """Position of the last token of each part, and its tokens after the first. Parts are adjacent."""
    starts = [place for place, token in enumerate(ids) if token == begin]
    assert starts == list(range(starts[0], starts[0] + count * (1 + size), 1 + size))
    assert starts[0] >= 1 and starts[-1] + size < len(ids)
    return [(start + size, ids[start + 1 : start + 1 + size]) for start in starts]


def solve_permutations(task: TaskConfig, ids: list[int], difficulty: int) -> dict[int, int]:
    points = int(task.group[1])
    elements = list(permutations(range(points)))
    answers = {}
    for end, word in parts(ids, task.queries, difficulty, 1 + len(elements)):
        moved = list(range(points))
        for place, token in enumerate(word, start=end - difficulty + 1):
            moved = [elements[token - 1][point] for point in moved]
            if place == end or task.ask == "steps":
                answers[place] = elements.index(tuple(moved)) + 1
    return answers


def solve_addition(task: TaskConfig, ids: list[int], difficulty: int) -> dict[int, int]:
    answers = {}
    for end, tokens in parts(ids, task.queries, difficulty * task.digits, 11):
        text = "".join(str(token - 1) for token in tokens)
        numbers = [int(text[i : i + task.digits][::-1]) for i in range(0, len(text), task.digits)]
        for count in range(1, difficulty + 1) if task.ask == "steps" else [difficulty]:
            first = end - (difficulty - count + 1) * task.digits + 1
            for place, digit in enumerate(str(sum(numbers[:count])).zfill(task.digits)[::-1][: task.digits]):
                answers[first + place] = int(digit) + 1
    return answers


SOLVERS = {"hops": solve_hops, "mano": solve_mano, "permutations": solve_permutations, "addition": solve_addition}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tell": "number", "symbols": 5},
        {"tell": "marks", "symbols": 7},
        {"tell": "marks", "symbols": 7, "queries": 3},
        {"tell": "marks", "symbols": 7, "queries": 3, "ask": "steps"},
        {"queries": 12},
        {"name": "mano"},
        {"name": "mano", "modulus": 5},
        {"name": "permutations"},
        {"name": "permutations", "group": "S5", "queries": 3},
        {"name": "permutations", "queries": 2, "ask": "steps"},
        {"name": "addition"},
        {"name": "addition", "digits": 2, "queries": 2, "ask": "steps"},
        {"name": "addition", "digits": 3, "queries": 2},
        {"name": "addition", "digits": 1},
    ],
)
@pytest.mark.parametrize(("difficulty", "longer"), [(1, 0), (4, 3), (9, 0)])
def test_answers_are_those_of_a_solver(settings: dict[str, Any], difficulty: int, longer: int) -> None:
    task = TaskConfig(**settings)
    length = task.length(difficulty) + longer
    sequences = make_sequences(task, np.arange(ROWS, dtype=np.uint64), difficulty, length)
    assert sequences.inputs.shape == sequences.targets.shape == (ROWS, length)
    assert sequences.inputs.max() < task.vocabulary
    for ids, targets in zip(sequences.inputs.tolist(), sequences.targets.tolist(), strict=True):
        asked = {place: answer for place, answer in enumerate(targets) if answer != -100}
        assert asked == SOLVERS[task.name](task, ids, difficulty)
        assert len(asked) == task.targets(difficulty)


def check_windows(task: TaskConfig, sequences: Sequences, difficulty: int) -> set[int]:
    """Check the products of the last elements one by one; return where the first was asked for."""
    elements = list(permutations(range(int(task.group[1]))))
    firsts = set()
    for ids, targets in zip(sequences.inputs.tolist(), sequences.targets.tolist(), strict=True):
        asked = [place for place, answer in enumerate(targets) if answer != -100]
        assert asked == list(range(asked[0], asked[0] + task.queries)), "side by side"
        assert asked[0] >= difficulty, "an element comes before the first product"
        for place in asked:
            moved = list(elements[0])
            for token in ids[place - difficulty + 1 : place + 1]:
                moved = [elements[token - 1][point] for point in moved]
            assert targets[place] == elements.index(tuple(moved)) + 1
        firsts.add(asked[0])
    return firsts


@pytest.mark.parametrize(("difficulty", "longer"), [(1, 0), (4, 0), (5, 6)])
def test_windows_ask_for_the_product_of_the_last_elements(difficulty: int, longer: int) -> None:
    task = TaskConfig(name="permutations", ask="windows", queries=7)
    length = task.length(difficulty) + longer
    sequences = make_sequences(task, np.arange(ROWS, dtype=np.uint64), difficulty, length)
    assert len(check_windows(task, sequences, difficulty)) == longer + 1, "anywhere in the sequence"
    assert set(np.unique(sequences.inputs)) == set(range(1, 7)), "elements alone"


def test_letters_are_the_same_in_every_run_and_their_products_all_elements() -> None:
    task = TaskConfig(name="permutations", group="S5", ask="windows", queries=20, letters=6)
    texts, answers = set(), set()
    for seed in range(3):
        keys = np.arange(seed * ROWS, (seed + 1) * ROWS, dtype=np.uint64)
        sequences = make_sequences(task, keys, 6, task.length(6))
        check_windows(task, sequences, 6)
        texts.add(tuple(np.unique(sequences.inputs)))
        answers |= set(sequences.targets[sequences.targets != -100].tolist())
    assert len(texts) == 1 and len(texts.pop()) == 6
    assert answers == set(range(1, 121))


@pytest.mark.parametrize(("difficulty", "longer"), [(1, 0), (4, 0), (5, 6)])
def test_windows_ask_for_the_sum_of_the_last_numbers(difficulty: int, longer: int) -> None:
    task = TaskConfig(name="addition", ask="windows", queries=7, digits=3)
    length = task.length(difficulty) + longer
    sequences = make_sequences(task, np.arange(ROWS, dtype=np.uint64), difficulty, length)
    firsts = set()
    for ids, targets in zip(sequences.inputs.tolist(), sequences.targets.tolist(), strict=True):
        begins = [place for place, token in enumerate(ids) if token == 11]
        assert begins == list(range(begins[0], begins[0] + (7 + difficulty) * 4, 4)), "one extra number, side by side"
        values = [sum((ids[begin + 1 + place] - 1) * 10**place for place in range(3)) for begin in begins]
        expected = {}
        for last in range(difficulty, 7 + difficulty):
            total = sum(values[last - difficulty + 1 : last + 1])
            for place in range(3):
                expected[begins[last] + 1 + place] = 1 + total // 10**place % 10
        assert {place: answer for place, answer in enumerate(targets) if answer != -100} == expected
        assert len(expected) == task.targets(difficulty)
        firsts.add(begins[0])
    assert len(firsts) == longer + 1, "anywhere in the sequence"


@pytest.mark.parametrize("name", ["permutations", "addition"])
def test_questions_are_anywhere(name: str) -> None:
    """The number of tokens before a question must not reveal its difficulty: all positions are equally frequent."""
    task = TaskConfig(name=name, queries=2)
    length = task.length(3) + 4
    sequences = make_sequences(task, np.arange(1000, dtype=np.uint64), 3, length)
    begins = (sequences.inputs == task.vocabulary - 1).argmax(1)
    assert np.bincount(begins)[1:].tolist() == pytest.approx([200] * 5, abs=60)
    assert not np.bincount(begins)[0]


def test_the_multiplication_table_is_that_of_a_group() -> None:
    for points in (3, 5):
        table = multiplication_table(points)
        size = len(table)
        everything = list(range(size))
        assert all(sorted(row) == everything for row in table.tolist())
        assert table[0].tolist() == table[:, 0].tolist() == everything
        some = np.random.default_rng(0).integers(size, size=(200, 3))
        a, b, c = some.T
        assert (table[table[a, b], c] == table[a, table[b, c]]).all()
        assert (table != table.T).any()


def test_draws_are_uniform() -> None:
    """Each kind of draw, by chi-square, within five standard deviations of its mean."""
    task = TaskConfig(symbols=5)
    sequences = make_sequences(task, np.arange(20_000, dtype=np.uint64), 1, 6)
    pairs = sequences.inputs[:, 0] - 6
    starts, answers = sequences.inputs[:, 5] - 1, sequences.targets[:, 5] - 1
    for drawn, cells in ((pairs, 25), (starts, 5), (starts * 5 + answers, 25)):
        counts = np.bincount(drawn, minlength=cells)
        expected = len(drawn) / cells
        assert len(counts) == cells
        assert ((counts - expected) ** 2 / expected).sum() < cells + 5 * (2 * cells) ** 0.5
    orders = Counter(map(tuple, ((sequences.inputs[:, :5] - 6) // 5).tolist()))
    assert len(orders) == 120 and max(orders.values()) < 1.5 * 20_000 / 120


def test_expressions_have_all_shapes() -> None:
    """Three operations split 0:2, 1:1 or 2:0 below the first, and 0:1 or 1:0 below that: 5 shapes, at 1/3 and 1/6."""
    task = TaskConfig(name="mano")
    sequences = make_sequences(task, np.arange(6000, dtype=np.uint64), 3, 8)
    shapes = Counter(map(tuple, (sequences.inputs[:, :7] > task.modulus).tolist()))
    counts = sorted(shapes.values())
    assert len(counts) == 5
    assert counts[-1] == pytest.approx(2000, rel=0.1)
    assert all(count == pytest.approx(1000, rel=0.15) for count in counts[:-1])


def test_what_does_not_fit_is_refused() -> None:
    keys = np.arange(2, dtype=np.uint64)
    with pytest.raises(ValueError, match="takes 13"):
        make_sequences(TaskConfig(), keys, 1, 12)
    with pytest.raises(ValueError, match="from 1 to"):
        make_sequences(TaskConfig(), keys, 0, 13)
    with pytest.raises(ValueError, match="from 1 to 64"):
        make_sequences(TaskConfig(tell="number"), keys, 65, 100)


def test_slots_of_a_step_cover_the_difficulties() -> None:
    task = TaskConfig(difficulty=(2, 5))
    drawn = [slot_difficulties(task, 8, 0, step, 200) for step in range(200)]
    assert all(sorted(slots) == [2, 2, 3, 3, 4, 4, 5, 5] for slots in drawn)
    assert len(set(map(tuple, drawn))) > 150
    assert [slot_difficulties(task, 8, 1, step, 200) for step in range(2)] != drawn[:2]
    one = Counter(slot_difficulties(task, 1, 0, step, 400)[0] for step in range(400))
    assert sorted(one) == [2, 3, 4, 5] and min(one.values()) > 60


def test_the_hardest_difficulty_rises() -> None:
    task = TaskConfig(difficulty=(2, 5), ramp=0.5)
    hardest = [max(slot_difficulties(task, 8, 0, step, 40)) for step in range(40)]
    assert hardest == [2] * 5 + [3] * 5 + [4] * 5 + [5] * 25
    assert set(slot_difficulties(task, 8, 0, 12, 40)) == {2, 3, 4}


# --- streams


def streams(rank: int = 0, world_size: int = 1, **changes: Any) -> TaskStreams:
    options: dict[str, Any] = {"streams": 4, "slots": 3, "steps": 100, "sequence_length": 14, "seed": 0, **changes}
    task = options.pop("task", TaskConfig(difficulty=(1, 3)))
    return TaskStreams(task, rank=rank, world_size=world_size, **options)


def taken(source: TaskStreams | Loader, steps: int) -> list[tuple[Any, ...]]:
    batches = []
    for _ in range(steps):
        batch = source.next_batch(3) if isinstance(source, TaskStreams) else source.next_batch()
        assert batch.document_ids is None
        batches.append((batch.ids.tolist(), batch.targets.tolist(), batch.rows.tolist()))
    return batches


def test_difficulty_of_a_row_is_that_of_its_slot() -> None:
    task = TaskConfig(difficulty=(1, 3))
    source = streams()
    seen = set()
    for step in range(5):
        batch = source.next_batch(3)
        assert batch.ids.shape == (12, 15) and batch.targets.shape == (12, 14)
        assert batch.rows.tolist() == list(range(12))
        difficulties = slot_difficulties(task, 3, 0, step, 100)
        for row, (ids, targets) in enumerate(zip(batch.ids.tolist(), batch.targets.tolist(), strict=True)):
            (place,) = (place for place, answer in enumerate(targets) if answer != -100)
            assert solve_hops(task, ids, difficulties[row // 4]) == {place: targets[place]}
            seen.add(tuple(ids))
    assert len(seen) == 60, "no sequence comes twice"


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_batches(world_size: int) -> None:
    whole = taken(streams(), 4)
    parts = [taken(streams(rank, world_size), 4) for rank in range(world_size)]
    for step, (ids, targets, rows) in enumerate(whole):
        for rank in range(world_size):
            mine = [row for row in rows if row % 4 % world_size == rank]
            assert parts[rank][step] == ([ids[r] for r in mine], [targets[r] for r in mine], mine)


def test_workers_read_the_same_batches(warm_workers: None) -> None:
    whole = taken(streams(), 4)
    loader = Loader(streams(), slots=3, workers=2, prefetch=2)
    try:
        assert taken(loader, 4) == whole
    finally:
        loader.close()


def test_a_saved_position_continues_at_any_world_size() -> None:
    whole = taken(streams(), 6)
    ranks = [Loader(streams(rank, 2), slots=3, workers=0, prefetch=1) for rank in range(2)]
    for loader in ranks:
        taken(loader, 3)
    state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in ranks])))
    assert count_skipped(state) == {}
    resumed = Loader(streams(), slots=3, workers=0, prefetch=1)
    resumed.load_state_dict(state)
    assert taken(resumed, 3) == whole[3:]
    share = streams(1, 4)
    share.load_state_dict(state)
    assert taken(share, 1)[0][0] == [ids for row, ids in enumerate(whole[3][0]) if row % 4 == 1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"task": TaskConfig(difficulty=(1, 4))}, "task was"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"slots": 6}, "slots was 3, is 6"),
        ({"streams": 8}, "streams was 4, is 8"),
        ({"sequence_length": 15}, "sequence_length was 14, is 15"),
    ],
)
def test_a_position_in_another_task_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(MythosError, match=named):
        streams(**changes).load_state_dict(streams().state_dict())


def test_a_position_in_a_former_text_of_the_task_is_refused() -> None:
    task = TaskConfig(name="trees", difficulty=(1, 2))
    now = streams(task=task, sequence_length=task.length(2))
    state = now.state_dict()
    del state["form"]
    with pytest.raises(MythosError, match="another task: form was None, is 2"):
        now.load_state_dict(state)
    assert "form" not in streams().state_dict(), "the text of hops has never changed"


@pytest.mark.parametrize(
    ("name", "ask", "text"),
    [
        ("hops", "end", "894b16bba27050fb"),
        ("mano", "end", "80b1d465ce7612c8"),
        ("permutations", "end", "d01982bfa6f83bbc"),
        ("permutations", "windows", "b79381e3f2954867"),
        ("addition", "end", "77486b6e70419d14"),
        ("addition", "windows", "fdcdee9b908dfed5"),
        ("trees", "end", "da9297bb768a06fd"),
        ("facts", "end", "90be1f31071f6f46"),
    ],
)
def test_a_changed_text_has_another_form(name: str, ask: str, text: str) -> None:
    """Where this fails on purpose, raise the task's number in FORMS: runs must not continue in another text."""
    task = TaskConfig(name=name, ask=ask, difficulty=(1, 2))
    sequences = make_sequences(task, np.arange(8, dtype=np.uint64), 2, task.length(2) + 3)
    made = np.stack(sequences).astype("<i4").tobytes()
    assert hashlib.blake2b(made, digest_size=8).hexdigest() == text


def test_a_position_of_other_streams_is_refused() -> None:
    with pytest.raises(MythosError, match=r"no position for streams \[1, 3\]"):
        streams(1, 2).load_state_dict(streams(0, 2).state_dict())
    with pytest.raises(MythosError, match="another task"):
        streams().load_state_dict({"streams": 4, "seed": 0, "sources": {}, "sequences": {}, "positions": {}})


def test_sets_are_fixed_and_no_part_of_training() -> None:
    task = TaskConfig()
    one_set = task_set(task, [3, 1], 50, 13, "validation")
    again = task_set(task, [3, 1], 50, 13, "validation")
    other = task_set(task, [3, 1], 50, 13, "report")
    assert one_set.ids.equal(again.ids) and one_set.targets.equal(again.targets)
    assert one_set.difficulties.tolist() == [3] * 50 + [1] * 50
    for ids, targets, difficulty in zip(
        one_set.ids.tolist(), one_set.targets.tolist(), one_set.difficulties, strict=True
    ):
        assert solve_hops(task, ids, int(difficulty)) == {12: targets[12]}
    trained = streams(task=task, streams=16, slots=8, sequence_length=13)
    rows = {tuple(ids[:-1]) for _ in range(20) for ids in trained.next_batch(8).ids.tolist()}
    for theirs in (set(map(tuple, other.ids.tolist())), rows):
        assert not theirs & set(map(tuple, one_set.ids.tolist()))
