"""How many rows an exchange of tokens has, if all experts are chosen equally often."""

from math import comb

from mythos.model.config import ModelConfig


def rows_to_experts(config: ModelConfig, ranks: int, tokens: int) -> int:
    """Rows that `tokens` tokens send to `ranks` ranks: one to each rank that holds any of a token's experts.

    The mean over tokens that choose k / M experts in each of M of the G groups, all equally likely. (Of M > 1 groups
    tokens may choose more in one than in another, which saves up to 5% of the rows.) A rank holds a part of one group,
    or whole groups.
    """
    groups, chosen = config.expert_groups, config.groups_per_token
    if chosen == groups:
        groups = chosen = 1
    of_group, of_rank = config.n_experts // groups, config.n_experts // ranks
    if of_rank >= of_group:
        reached = 1 - comb(groups - of_rank // of_group, chosen) / comb(groups, chosen)
    else:
        in_each = config.experts_per_token // chosen
        reached = chosen / groups * (1 - comb(of_group - of_rank, in_each) / comb(of_group, in_each))
    return round(tokens * ranks * reached)
