"""Rows of an exchange of tokens against tokens that are routed at random."""

import pytest
import torch

from mythos.config.presets import preset_config
from mythos.model.moe import Router
from mythos.planning.expert_rows import rows_to_experts


@pytest.mark.parametrize("ranks", [1, 2, 4, 16, 32])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (4, 4), (8, 1), (8, 2), (16, 4)])
def test_rows_are_those_of_random_tokens(ranks: int, groups: tuple[int, int]) -> None:
    """A row to each rank that holds any of a token's experts."""
    shape = {"n_experts": 32, "experts_per_token": 4, "expert_groups": groups[0], "groups_per_token": groups[1]}
    config = preset_config("mythos_nano", **shape)
    router, tokens = Router.build(config), 4000
    generator = torch.Generator().manual_seed(0)
    # Independent logits: the router's matrix is the unit matrix.
    router.weight = torch.nn.Parameter(torch.eye(32))
    experts = router(torch.randn(tokens, 32, generator=generator))[1]
    reached = sum(len(set(ranks_of)) for ranks_of in (experts // (32 // ranks)).tolist())
    expected = rows_to_experts(config, ranks, tokens)
    assert (0.94 if 1 < groups[1] < groups[0] else 0.99) * expected < reached <= 1.01 * expected


def test_rows_of_one_rank_and_of_as_many_ranks_as_experts() -> None:
    config = preset_config("mythos_nano", n_experts=32, experts_per_token=4)
    assert rows_to_experts(config, 1, 100) == 100
    assert rows_to_experts(config, 32, 100) == 400
    grouped = config.model_copy(update={"expert_groups": 8, "groups_per_token": 1})
    assert rows_to_experts(grouped, 8, 100) == rows_to_experts(grouped, 4, 100) == 100
