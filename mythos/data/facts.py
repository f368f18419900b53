"""A fixed graph of facts for the task `facts`, and its questions of training and of the tests.

A fact is (entity, relation) -> entity. A question is an entity and one relation or more; its answer is the entity at
the end. After arXiv 2405.15071 and 2604.07822: all facts are trained, but some of them, the unseen ones, are part of no
longer question of training.

Shape suffixes: E entities, K relations of an entity, N questions, C tokens of a question.
"""

from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from mythos.config.data import TaskConfig
from mythos.data.random_bits import Draws, sequence_keys

Split = Literal["train", "in", "out"]
"""Questions of training; in distribution: others that are made of the same facts; out of distribution: made of unseen
facts only. Of a single relation: all facts, those that training composes, the unseen ones."""


class Questions(NamedTuple):
    """Questions of one split and difficulty.

    Attributes:
        chains: int64 (N, 1 + relations): the entity, then the relations.
        answers: int64 (N,): the entity at the end.
    """

    chains: np.ndarray
    answers: np.ndarray


class FactGraph:
    """The facts of a task: a function of its configuration alone, so every run and test has the same ones."""

    def __init__(self, task: TaskConfig) -> None:
        self.task = task
        count, per_entity = task.entities, task.relations_per_entity
        if task.graph == "permutations":
            self.relations_EK = np.tile(np.arange(task.relations), (count, 1))
            draws = Draws(sequence_keys("facts/permutations", np.arange(task.relations)))
            self.tails_EK = draws.permutations(count).T
        else:
            draws = Draws(sequence_keys("facts/random", np.arange(count)))
            self.relations_EK = draws.permutations(task.relations)[:, :per_entity]
            self.tails_EK = draws.integers(count, per_entity)
        total = count * per_entity
        order = np.argsort(Draws(sequence_keys("facts/unseen", np.arange(total))).bits(1)[:, 0], kind="stable")
        unseen = np.zeros(total, bool)
        unseen[order[: round(task.unseen * total)]] = True
        self.unseen_EK = unseen.reshape(count, per_entity)

    def questions(self, difficulty: int, split: Split) -> Questions:
        """The questions of a split with that number of relations. Raises ValueError if there are none."""
        chains, answers, unseen = _chains(self.task, difficulty)
        if difficulty == 1:
            chosen = {"train": unseen >= 0, "in": unseen == 0, "out": unseen == 1}[split]
        elif split == "out":
            chosen = unseen == difficulty
        else:
            inside = np.flatnonzero(unseen == 0)
            keys = sequence_keys(f"facts/questions/{difficulty}", inside)
            order = np.argsort(Draws(keys).bits(1)[:, 0], kind="stable")
            trained = round(self.task.ratio * self.task.entities * self.task.relations_per_entity)
            chosen = inside[order[:trained] if split == "train" else order[trained:]]
        if not len(chains[chosen]):
            raise ValueError(
                f"facts: no questions of difficulty {difficulty} in the split {split}; lower data.task.ratio to leave "
                "some for the test in distribution, raise data.task.unseen for that out of distribution"
            )
        return Questions(chains[chosen], answers[chosen])


@cache
def fact_graph(task: TaskConfig) -> FactGraph:
    """The graph of a task, kept."""
    return FactGraph(task)


@cache
def _chains(task: TaskConfig, difficulty: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All questions of a number of relations: chains, answers, and the number of unseen facts in each."""
    graph = fact_graph(task)
    chains, ends = np.arange(task.entities)[:, None], np.arange(task.entities)
    unseen = np.zeros(task.entities, np.int64)
    per_entity = task.relations_per_entity
    for _ in range(difficulty):
        relations = graph.relations_EK[ends].reshape(-1, 1)
        unseen = np.repeat(unseen, per_entity) + graph.unseen_EK[ends].reshape(-1)
        chains = np.concatenate([np.repeat(chains, per_entity, axis=0), relations], axis=1)
        ends = graph.tails_EK[ends].reshape(-1)
    return chains, ends, unseen
