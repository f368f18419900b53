"""Mixture of experts against a loop over experts with dense gather."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.model.config import ModelConfig
from mythos.model.moe import MixtureOfExperts, Router
from tests.model.conftest import scrambled

GENERATOR_SEED = 0


def naive_choice(biased: Tensor, router: Router) -> Tensor:
    """The best experts of the best groups, one token after another, best expert first."""
    size, judged = biased.shape[1] // router.groups, router.chosen // router.chosen_groups
    chosen = []
    for token in biased.tolist():
        groups = [range(group * size, (group + 1) * size) for group in range(router.groups)]
        groups.sort(key=lambda group: -sum(sorted(token[expert] for expert in group)[-judged:]))
        eligible = [expert for group in groups[: router.chosen_groups] for expert in group]
        chosen.append(sorted(eligible, key=lambda expert: -token[expert])[: router.chosen])
    return torch.tensor(chosen)


def naive_moe(module: MixtureOfExperts, x: Tensor) -> Tensor:
    """Every token times every expert it chose, one expert after another."""
    tokens = x.flatten(0, 1)
    affinity = 1 / (1 + torch.exp(-(tokens @ module.router.weight.T)))
    chosen = naive_choice(affinity + module.router.bias, module.router)
    output = torch.zeros_like(tokens)
    for expert in range(len(module.gate_up)):
        for token in range(len(tokens)):
            if expert in chosen[token].tolist():
                weight = affinity[token, expert] / affinity[token, chosen[token]].sum()
                gate, up = (tokens[token] @ module.gate_up[expert]).chunk(2)
                output[token] = output[token] + weight * ((gate * torch.sigmoid(gate) * up) @ module.down[expert])
    if module.shared is not None:
        gate, up = (tokens @ module.shared.gate_up.weight.T).chunk(2, dim=-1)
        output = output + (gate * torch.sigmoid(gate) * up) @ module.shared.down.weight.T
    return output.view_as(x)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_shared_experts": 0},
        {"experts_per_token": 1},
        {"n_shared_experts": 2},
        {"expert_groups": 2},
        {"expert_groups": 4, "groups_per_token": 2, "experts_per_token": 4},
    ],
    ids=str,
)
def test_matches_loop_over_experts_and_its_gradient(small, changes):
    module = scrambled(MixtureOfExperts(small(**changes)))
    module.router.bias.copy_(torch.linspace(-0.3, 0.3, len(module.router.bias)))
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(GENERATOR_SEED), requires_grad=True)
    inputs = [x, *module.parameters()]

    output, experts = module(x)
    expected = naive_moe(module, x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert experts.shape == (2, 9, module.router.chosen)

    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    actual_grads = torch.autograd.grad((output * weight).sum(), inputs, retain_graph=True)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    for actual, reference in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)


def test_expert_without_tokens_gets_zero_gradient_and_harms_nothing(small):
    module = scrambled(MixtureOfExperts(small()))
    module.router.bias[3] = -10.0
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))
    output, experts = module(x)
    assert 3 not in experts
    torch.testing.assert_close(output, naive_moe(module, x), rtol=1e-5, atol=1e-5)
    output.sum().backward()
    assert module.gate_up.grad[3].abs().max() == 0


def test_experts_lie_in_the_chosen_groups():
    """Whatever the bias; and of as many groups as there are, routing is the same as without groups."""
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(3))
    fields = {"dim": 16, "n_experts": 16, "experts_per_token": 4}
    plain, all_groups, two, one = (
        Router(ModelConfig(**fields, expert_groups=groups, groups_per_token=chosen))
        for groups, chosen in ((1, 1), (4, 4), (4, 2), (8, 2))
    )
    for router in (plain, all_groups, two, one):
        scrambled(router)
        router.bias.copy_(torch.linspace(-1.2, -0.8, 16))  # biased affinities are negative
    assert all(torch.equal(*pair) for pair in zip(plain(x), all_groups(x), strict=True))
    for router, size, most in ((two, 4, 2), (one, 2, 2)):
        gates, experts = router(x)
        assert {len(set(groups)) for groups in (experts // size).tolist()} <= set(range(1, most + 1))
        assert all(len(set(token)) == 4 for token in experts.tolist())
        torch.testing.assert_close(gates.sum(-1), torch.ones(200))
    assert {len(set(groups)) for groups in (plain(x)[1] // 4).tolist()} - {1, 2}


def test_gates_ignore_the_bias_and_sum_to_one():
    router = scrambled(Router(ModelConfig(dim=16, n_experts=6, experts_per_token=2)))
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(3))
    router.bias[4] = 5.0  # every token is sent there, whatever its affinity
    gates, experts = router(x)
    assert (experts == 4).any(-1).all()
    affinity = torch.sigmoid(F.linear(x, router.weight)).gather(-1, experts)
    torch.testing.assert_close(gates, affinity / affinity.sum(-1, keepdim=True), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gates.sum(-1), torch.ones(20))


def test_bias_moves_against_the_load_and_balances():
    router = scrambled(Router(ModelConfig(dim=16, n_experts=6, experts_per_token=2)))
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(4)) + 0.5
    before = torch.bincount(router(x)[1].flatten(), minlength=6)
    router.rebalance(before, 0.01)
    expected = 0.01 * torch.sign(before.float().mean() - before.float())
    torch.testing.assert_close(router.bias, expected)
    for _ in range(300):
        router.rebalance(torch.bincount(router(x)[1].flatten(), minlength=6), 0.01)
    after = torch.bincount(router(x)[1].flatten(), minlength=6)
    assert before.max() > 1.5 * before.float().mean()
    assert after.max() < 1.1 * after.float().mean()
