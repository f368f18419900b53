"""The split of a budget against published figures."""

import math

import pytest

from mythos.config.presets import preset_config
from mythos.planning.budget import optimal_split
from mythos.planning.flops import forward_flops


@pytest.mark.parametrize(
    ("name", "ffn_dim", "published"),  # 2/3 of the paper's 3,072 and 4,096: three matrices instead of two
    [
        ("looped_140m", 2048, {1: 2, 2: 2, 4: 4, 8: 6, 16: 8, 64: 10}),
        ("looped_370m", 2728, {32: 4, 64: 6, 128: 6}),
    ],
)
def test_optimal_loops_are_near_the_published_ones(name: str, ffn_dim: int, published: dict[int, int]) -> None:
    """Table 6 of arXiv 2604.12946, whose loops are even numbers; exponents of tokens are from its section 5.2."""
    config = preset_config(name, ffn_dim=ffn_dim, vocab_size=32_768)
    splits = {budget: optimal_split(config, 2048, budget * 1e18) for budget in published}
    for budget, loops in published.items():
        assert splits[budget].loops == pytest.approx(loops, rel=0.45), budget
    for split in splits.values():
        backprop = max(1.0, split.loops / 2)
        flops = forward_flops(config, 2048)
        cost = 3 * flops.once + flops.loop * (split.loops + 2 * backprop)
        assert cost * split.tokens == pytest.approx(split.flops)
    first, last = splits[min(published)], splits[max(published)]
    assert math.log(last.loops / first.loops) / math.log(last.flops / first.flops) == pytest.approx(0.40, abs=1e-6)
    assert math.log(last.tokens / first.tokens) / math.log(last.flops / first.flops) == pytest.approx(0.78, abs=0.06)
