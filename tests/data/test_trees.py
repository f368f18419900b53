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


@pytest.mark.parametrize(("branches", "levels", "difficulty"), [(2, 3, 1), (2, 3, 3), (3, 2, 2)])
def test_the_answer_is_the_node_that_the_edges_lead_to(branches: int, levels: int, difficulty: int) -> None:
    task = TaskConfig(name="trees", difficulty=(1, levels), branches=branches, levels=levels, queries=4)
    sequences = make_sequences(task, np.arange(50, dtype=np.uint64), difficulty, task.length(difficulty) + 2)
    edges, firsts = task.nodes - 2, set()
    for inputs, targets in zip(sequences.inputs.tolist(), sequences.targets.tolist(), strict=True):
        pairs = [divmod(token - 1 - task.nodes, task.nodes) for token in inputs[:edges]]
        assert len(set(pairs)) == edges and all(0 <= node < task.nodes for pair in pairs for node in pair)
        level = {inputs[edges] - 1}
        for _ in range(difficulty):
            level = {child for parent, child in pairs if parent in level}
        assert len(level) == branches**difficulty
        for query in range(4):
            one, other = (inputs[edges + 1 + 2 * query + place] - 1 for place in (0, 1))
            answer = targets[edges + 2 + 2 * query] - 1
            assert (one in level) != (other in level)
            assert answer == (one if one in level else other)
            firsts.add(one in level)
        assert [place for place, target in enumerate(targets) if target != -100] == [
            edges + 2 + 2 * q for q in range(4)
        ]
        assert inputs[-2:] == [0, 0]
    assert firsts == {True, False}  # the order of a pair does not tell
    assert sequences.inputs.max() < task.vocabulary


def test_the_decoy_is_as_deep_in_the_other_tree() -> None:
    task = TaskConfig(name="trees", difficulty=(1, 2), branches=2, levels=2)
    for inputs in make_sequences(task, np.arange(20, dtype=np.uint64), 2, task.length(2)).inputs.tolist():
        pairs = [divmod(token - 1 - task.nodes, task.nodes) for token in inputs[:12]]
        parents = {child: parent for parent, child in pairs}
        depths = []
        for node in (inputs[13] - 1, inputs[14] - 1):
            depth = 0
            while node in parents:
                node, depth = parents[node], depth + 1
            depths.append(depth)
        assert depths == [2, 2]


def test_levels_of_the_probe_are_those_of_the_text() -> None:
    task = TaskConfig(name="trees", difficulty=(1, 2), branches=2, levels=2)
    ids = torch.from_numpy(make_sequences(task, np.arange(5, dtype=np.uint64), 2, task.length(2)).inputs)
    members = level_members(ids, task.nodes, task.nodes - 2, 2)
    assert members.sum(1).tolist() == [4.0] * 5
    assert all(
        members[row, int(max(ids[row, 13], 0)) - 1] + members[row, int(ids[row, 14]) - 1] == 1 for row in range(5)
    )


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
