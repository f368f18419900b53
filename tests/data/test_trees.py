"""The task `trees` against a search of the edges that are in the text."""

from typing import Any

import numpy as np
import pytest
import torch

from mythos.claims.measures import level_members, probe_recall
from mythos.config.data import TaskConfig
from mythos.config.loading import config_from_dict
from mythos.data.tasks import make_sequences
from mythos.errors import MythosError


def edges_of(task: TaskConfig, inputs: list[int]) -> list[tuple[int, int]]:
    """The pairs (parent, child) of a text, nodes from 0."""
    return [divmod(token - 1 - task.nodes, task.nodes) for token in inputs[: task.nodes - 2]]


def level_of(task: TaskConfig, node: int) -> int:
    """Each level has nodes of its own: two roots first, then as many as both trees have below."""
    sizes = [2 * task.branches**level for level in range(task.levels + 1)]
    return next(level for level in range(task.levels + 1) if node < sum(sizes[: level + 1]))


@pytest.mark.parametrize(("branches", "levels", "difficulty"), [(2, 3, 1), (2, 3, 2), (2, 3, 3), (3, 2, 1), (3, 2, 2)])
def test_the_answer_is_the_node_that_the_edges_lead_to(branches: int, levels: int, difficulty: int) -> None:
    task = TaskConfig(name="trees", difficulty=(1, levels), branches=branches, levels=levels, queries=4)
    sequences = make_sequences(task, np.arange(200, dtype=np.uint64), difficulty, task.length(difficulty) + 2)
    count, orders, starts = task.nodes - 2, set(), set()
    for inputs, targets in zip(sequences.inputs.tolist(), sequences.targets.tolist(), strict=True):
        pairs = edges_of(task, inputs)
        assert sorted(child for _, child in pairs) == list(range(2, task.nodes)), "all nodes but the roots, once each"
        assert all(level_of(task, child) == level_of(task, parent) + 1 for parent, child in pairs)
        assert {sum(parent == node for parent, _ in pairs) for node in range(task.nodes)} == {0, branches}
        for query in range(4):
            one, other, start = (inputs[count + 3 * query + place] - 1 for place in range(3))
            level = {start}
            for _ in range(difficulty):
                level = {child for parent, child in pairs if parent in level}
            assert len(level) == branches**difficulty
            assert (one in level) != (other in level)
            assert level_of(task, one) == level_of(task, other) == level_of(task, start) + difficulty
            assert targets[count + 3 * query + 2] - 1 == (one if one in level else other)
            orders.add(one in level)
            starts.add(start)
        places = [place for place, target in enumerate(targets) if target != -100]
        assert places == [count + 3 * query + 2 for query in range(4)]
        assert inputs[-2:] == [0, 0]
    assert orders == {True, False}  # the order of a pair does not tell
    assert starts == {node for node in range(task.nodes) if level_of(task, node) + difficulty <= levels}
    assert sequences.inputs.max() < task.vocabulary


def test_every_other_node_of_the_level_is_offered() -> None:
    """Of the 6 nodes of a level that are not the 2 below the start: those of its tree and of the other, equally."""
    task = TaskConfig(name="trees", difficulty=(1, 2), branches=2, levels=2, queries=8)
    near, far = 0, 0
    for inputs in make_sequences(task, np.arange(2000, dtype=np.uint64), 1, task.length(1)).inputs.tolist():
        parents = {child: parent for parent, child in edges_of(task, inputs)}
        for query in range(8):
            one, other, start = (inputs[12 + 3 * query + place] - 1 for place in range(3))
            if level_of(task, start) == 1:
                decoy = other if parents[one] == start else one
                near += parents[parents[decoy]] == parents[start]
                far += parents[parents[decoy]] != parents[start]
    assert near / (near + far) == pytest.approx(2 / 6, abs=0.015)


def test_levels_of_the_probe_are_those_of_the_text() -> None:
    task = TaskConfig(name="trees", difficulty=(1, 2), branches=2, levels=2)
    ids = torch.from_numpy(make_sequences(task, np.arange(5, dtype=np.uint64), 2, task.length(2)).inputs)
    members = level_members(ids, task.nodes, 2)
    assert members.sum(1).tolist() == [4.0] * 5
    assert not members[:, :6].any(), "nodes of the levels above"
    assert all(members[row, int(ids[row, -3]) - 1] + members[row, int(ids[row, -2]) - 1] == 1 for row in range(5))


def test_the_probe_finds_what_is_in_the_state_and_nothing_in_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    members = torch.zeros(2000, 14, dtype=torch.float64)
    members.scatter_(1, torch.rand(2000, 14, generator=generator).topk(4, dim=1).indices, 1.0)
    mixing = torch.randn(14, 32, generator=generator).double()
    assert probe_recall(members @ mixing, members) > 0.99
    noise = torch.randn(2000, 32, generator=generator).double()
    assert probe_recall(noise, members) == pytest.approx(4 / 14, abs=0.03)


def test_difficulties_below_the_leaves_are_refused() -> None:
    values: dict[str, Any] = {"data": {"kind": "reasoning", "sequence_length": 64}, "train": {"steps": 1}}
    values["data"]["task"] = {"name": "trees", "difficulty": [1, 4]}
    with pytest.raises(MythosError, match="no node is more levels below the root"):
        config_from_dict(values | {"depth": {"follow": "difficulty"}})
