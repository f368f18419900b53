"""Rows of an exchange of tokens against tokens that are routed at random."""

import pytest
import torch

from mythos.config.presets import preset_config
from mythos.model.moe import Router
from mythos.planning.expert_rows import rows_to_experts


@pytest.mark.parametrize("ranks", [1, 2, 4, 16, 32])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (4, 4), (8, 1), (8, 2), (16, 4)])
def test_rows_are_those_of_random_tokens(ranks: int, groups: tuple[int, int]) -> None:
    check_rows(32, 4, groups, ranks)


@pytest.mark.parametrize(
    ("experts", "chosen", "groups", "ranks"),
    [(6, 2, (3, 1), 2), (12, 2, (6, 1), 4), (24, 4, (6, 2), 4), (12, 2, (2, 1), 3), (24, 4, (3, 2), 8)],
)
def test_rows_of_ranks_that_hold_parts_of_groups(
    experts: int, chosen: int, groups: tuple[int, int], ranks: int
) -> None:
    check_rows(experts, chosen, groups, ranks)


def check_rows(experts: int, chosen: int, groups: tuple[int, int], ranks: int) -> None:
    """A row to each rank that holds any of a token's experts."""
    shape = {"n_experts": experts, "experts_per_token": chosen}
    config = preset_config("mythos_nano", **shape, expert_groups=groups[0], groups_per_token=groups[1])
    router, tokens = Router(config), 4000
    generator = torch.Generator().manual_seed(0)
    # Independent logits: the router's matrix is the unit matrix.
    router.weight = torch.nn.Parameter(torch.eye(experts))
    routed = router(torch.randn(tokens, experts, generator=generator))[1]
    reached = sum(len(set(ranks_of)) for ranks_of in (routed // (experts // ranks)).tolist())
    expected = rows_to_experts(config, ranks, tokens)
    assert (0.94 if 1 < groups[1] < groups[0] else 0.99) * expected < reached <= 1.01 * expected


def test_rows_of_one_rank_and_of_as_many_ranks_as_experts() -> None:
    config = preset_config("mythos_nano", n_experts=32, experts_per_token=4)
    assert rows_to_experts(config, 1, 100) == 100
    assert rows_to_experts(config, 32, 100) == 400
    grouped = config.model_copy(update={"expert_groups": 8, "groups_per_token": 1})
    assert rows_to_experts(grouped, 8, 100) == rows_to_experts(grouped, 4, 100) == 100
