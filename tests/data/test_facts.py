"""The task `facts` against a dictionary of facts that is read step by step."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from mythos.config.data import TaskConfig
from mythos.config.loading import config_from_dict
from mythos.data.facts import fact_graph
from mythos.data.tasks import TaskStreams, make_sequences, task_set
from mythos.errors import MythosError

TASK = TaskConfig(
    name="facts", difficulty=(1, 2), entities=30, relations=10, facts_per_entity=5, ratio=2.0, unseen=0.2, queries=3
)
PERMUTED = TASK.model_copy(update={"graph": "permutations", "entities": 12, "relations": 4, "difficulty": (1, 3)})
Facts = dict[tuple[int, int], int]


def facts_of(task: TaskConfig) -> tuple[Facts, set[tuple[int, int]]]:
    """All facts (entity, relation) -> entity, and the unseen ones, from the questions of one relation."""
    graph = fact_graph(task)
    every, unseen = graph.questions(1, "train"), graph.questions(1, "out")
    facts = {tuple(chain): int(answer) for chain, answer in zip(every.chains.tolist(), every.answers, strict=True)}
    return facts, set(map(tuple, unseen.chains.tolist()))


def followed(facts: Facts, chain: list[int]) -> tuple[int, list[tuple[int, int]]]:
    """The entity at the end of a question, and the facts on the way."""
    here, *relations = chain
    used = []
    for relation in relations:
        used.append((here, relation))
        here = facts[here, relation]
    return here, used


def is_chain(facts: Facts, chain: tuple[int, ...]) -> bool:
    here = chain[0]
    for relation in chain[1:]:
        if (here, relation) not in facts:
            return False
        here = facts[here, relation]
    return True


def test_facts_are_drawn_as_configured() -> None:
    facts, unseen = facts_of(TASK)
    assert len(facts) == 30 * 5 and len(unseen) == 30  # 20%
    assert all(sum(entity == head for head, _ in facts) == 5 for entity in range(30))
    assert {relation for _, relation in facts} == set(range(10))
    seen = {tuple(chain) for chain in fact_graph(TASK).questions(1, "in").chains.tolist()}
    assert seen | unseen == facts.keys() and not seen & unseen


def test_every_relation_of_a_permutation_graph_is_one() -> None:
    facts, _ = facts_of(PERMUTED)
    assert len(facts) == 12 * 4
    for relation in range(4):
        assert sorted(facts[entity, relation] for entity in range(12)) == list(range(12))


@pytest.mark.parametrize("task", [TASK, PERMUTED])
def test_splits_divide_all_questions_and_answers_follow_the_facts(task: TaskConfig) -> None:
    facts, unseen = facts_of(task)
    for difficulty in range(2, task.difficulty[1] + 1):
        found = {split: fact_graph(task).questions(difficulty, split) for split in ("train", "in", "out")}
        chains = {split: list(map(tuple, questions.chains.tolist())) for split, questions in found.items()}
        for split, questions in found.items():
            for chain, answer in zip(questions.chains.tolist(), questions.answers, strict=True):
                end, used = followed(facts, chain)
                assert end == answer
                assert all((fact in unseen) == (split == "out") for fact in used)
        assert len(chains["train"]) == task.ratio * len(facts)
        assert not set(chains["train"]) & set(chains["in"])
        possible = [
            chain
            for chain in product(range(task.entities), *[range(task.relations)] * difficulty)
            if is_chain(facts, chain) and not unseen & set(followed(facts, list(chain))[1])
        ]
        assert sorted(chains["train"] + chains["in"]) == possible


@pytest.mark.parametrize(("difficulty", "split"), [(1, "train"), (2, "train"), (2, "in"), (2, "out")])
def test_sequences_ask_questions_of_their_split(difficulty: int, split: Any) -> None:
    facts, _ = facts_of(TASK)
    known = {tuple(chain) for chain in fact_graph(TASK).questions(difficulty, split).chains.tolist()}
    sequences = make_sequences(TASK, np.arange(400, dtype=np.uint64), difficulty, 10, split)
    asked = set()
    for inputs, targets in zip(sequences.inputs.tolist(), sequences.targets.tolist(), strict=True):
        for question in range(3):
            start = question * (1 + difficulty)
            entity, *relations = inputs[start : start + 1 + difficulty]
            chain = [entity - 1, *(relation - 31 for relation in relations)]
            assert tuple(chain) in known
            asked.add(tuple(chain))
            assert targets[start : start + difficulty] == [-100] * difficulty
            assert targets[start + difficulty] == 1 + followed(facts, chain)[0]
        assert inputs[3 * (1 + difficulty) :] == [0] * (10 - 3 * (1 + difficulty))
    assert len(asked) > 0.9 * min(len(known), 300)
    assert max(map(max, sequences.inputs.tolist())) < TASK.vocabulary == 1 + 30 + 10


def test_a_set_of_a_split_is_that_split() -> None:
    known = {tuple(chain) for chain in fact_graph(TASK).questions(2, "out").chains.tolist()}
    ids = task_set(TASK, [2], 50, 9, "claim", "out").ids
    assert all((one[0] - 1, one[1] - 31, one[2] - 31) in known for one in ids.tolist())


def test_states_have_no_newer_fields_that_their_task_does_not_use() -> None:
    """Checkpoints of earlier versions lack them and must still open."""
    common: dict[str, Any] = {"streams": 2, "slots": 1, "steps": 1, "sequence_length": 13, "seed": 0}
    assert "entities" not in TaskStreams(TaskConfig(), **common).identity["task"]
    assert "entities" in TaskStreams(TASK, **common).identity["task"]
    words = TaskConfig(name="permutations")
    assert "letters" not in TaskStreams(words, **common).identity["task"]
    some = words.model_copy(update={"letters": 2})
    assert TaskStreams(some, **common).identity["task"]["letters"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts_per_entity": 20, "relations": 10}, "got 20 and 10; an entity has each relation at most once"),
        ({"difficulty": [1, 6]}, "at most 10,000,000 are listed"),
        ({"unseen": 1e-4}, "less than one fact"),
        ({"symbols": 9}, "symbols is for the task hops only"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    task = {"name": "facts", "difficulty": [1, 2]} | changes
    values: dict[str, Any] = {"data": {"kind": "reasoning", "task": task, "sequence_length": 64}, "train": {"steps": 1}}
    values |= {"model": {"halting": "none"}, "depth": {"backprop": 8}}
    with pytest.raises(MythosError, match=message):
        config_from_dict(values)


def test_a_ratio_that_leaves_no_test_says_so() -> None:
    greedy = TASK.model_copy(update={"ratio": 100.0})
    with pytest.raises(ValueError, match="no questions of difficulty 2 in the split in"):
        fact_graph(greedy).questions(2, "in")
