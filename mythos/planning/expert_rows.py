"""How many rows an exchange of tokens has, if all experts are chosen equally often."""

from functools import cache
from math import comb

from mythos.model.config import ModelConfig


def rows_to_experts(config: ModelConfig, ranks: int, tokens: int) -> int:
    """Rows that `tokens` tokens send to `ranks` ranks: one to each rank that holds any of a token's experts.

    The mean over tokens that choose k / M experts in each of M of the G groups, all equally likely. (Of M > 1 groups
    tokens may choose more in one than in another, which saves up to 5% of the rows.)
    """
    groups, chosen = config.expert_groups, config.groups_per_token
    if chosen == groups:
        groups = chosen = 1
    return round(tokens * _ranks_of_token(config.n_experts, config.experts_per_token, groups, chosen, ranks))


@cache
def _ranks_of_token(experts: int, k: int, groups: int, chosen: int, ranks: int) -> float:
    """Mean number of ranks that hold any of a token's experts."""
    of_group, of_rank, in_each = experts // groups, experts // ranks, k // chosen
    reached = 0.0
    for first in range(0, experts, of_rank):
        # Coefficients of x^j: the chance that j groups which share experts with the rank are chosen without these,
        # times the number of ways in which j groups are chosen. The other groups never reach the rank.
        missed, others = [1.0], groups
        for group in range(first // of_group, (first + of_rank - 1) // of_group + 1):
            held = min(first + of_rank, (group + 1) * of_group) - max(first, group * of_group)
            chance = comb(of_group - held, in_each) / comb(of_group, in_each)
            missed = [a + chance * b for a, b in zip([*missed, 0.0], [0.0, *missed], strict=True)]
            others -= 1
        ways = sum(a * comb(others, chosen - j) for j, a in enumerate(missed[: chosen + 1]))
        reached += 1 - ways / comb(groups, chosen)
    return reached
