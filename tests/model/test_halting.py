"""The gate that is trained beside the model, and adaptive computation time, against their definitions written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.model.attention.context import attention_context
from mythos.model.cache import DecodeCache
from mythos.model.halting import ActHalting, HaltingGate, halting_rule
from mythos.model.layers import initialize
from mythos.model.rdt import RecurrentDepthTransformer
from scripts.benchmarks.products import executed_flops

Build = Callable[..., RecurrentDepthTransformer]
DEPTHS, BACKPROP, LENGTH = [5, 3, 3, 1], 2, 9


def inputs(length: int = LENGTH, rows: int = len(DEPTHS)) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 128, (rows, length + 1), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


def trunk_gradients(model: RecurrentDepthTransformer, **options: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(*inputs(), loops=DEPTHS, backprop=BACKPROP, **options).objective.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if not name.startswith("halting.")}


def logits_after(model: RecurrentDepthTransformer, loops: int, documents: Tensor | None) -> Tensor:
    with torch.no_grad():
        return model(inputs()[0], loops=loops, document_ids=documents).logits.log_softmax(-1)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gate_leaves_the_trunks_gradients_as_they_are_bit_by_bit(model: Build, recomputed: bool, documents: bool):
    numbers = (torch.arange(LENGTH) // 4).expand(4, -1) if documents else None
    with_gate, without = model(halting="gate"), model(halting="none")
    for one in (with_gate, without):
        one.recurrence.checkpointing = "loop" if recomputed else "none"
    expected = trunk_gradients(without, document_ids=numbers)
    for early in ({}, {"early_rows": [1, 2], "early_by": 2}, {"early_rows": [0], "early_by": 1}):
        actual = trunk_gradients(with_gate, document_ids=numbers, **early)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
        touched = [bool(p.grad.any()) for p in with_gate.halting.parameters()]
        assert all(touched) if early else not any(touched), (
            "every parameter has a gradient, zero if nothing is read out"
        )


@pytest.mark.parametrize("documents", [False, True])
def test_gate_learns_from_the_divergence_of_early_from_full_depth(model: Build, documents: bool):
    """Rows 1 and 2 of 3 loops, read out after 1: the loss is the Poisson regression on KL(p_3 || p_1)."""
    gated, (ids, targets) = model(halting="gate"), inputs()
    numbers = (torch.arange(LENGTH) // 4).expand(4, -1) if documents else None
    targets = targets.clone()
    targets[1, 4:] = -100
    output = gated(ids, targets, loops=DEPTHS, early_rows=[1, 2], early_by=2, document_ids=numbers)
    early, full = (logits_after(gated, loops, numbers)[1:3] for loops in (1, 3))
    divergence = F.kl_div(early, full, log_target=True, reduction="none").sum(-1)
    states: list[Tensor] = [torch.zeros(2, LENGTH, gated.config.dim)]
    with torch.no_grad():
        gated.read_depths(
            ids[1:3], targets[1:3], [1], None if numbers is None else numbers[1:3],
            observe=lambda after: states.append(after.state),
        )  # fmt: skip
        expected = gated.halting(states[0], states[1])
    losses = (expected.exp() - divergence * expected)[targets[1:3] != -100]
    torch.testing.assert_close(output.halting_loss, losses.sum(), rtol=1e-4, atol=1e-5)
    assert torch.equal(output.objective, output.loss + output.halting_loss)


def test_gate_learns_from_the_few_positions_that_are_asked_for(model: Build):
    """One target a row, in a sequence longer than the positions that a row is looked at in."""
    gated, (ids, targets) = model(halting="gate"), inputs(300, 2)
    targets = torch.full_like(targets, -100)
    targets[:, -1] = 5
    output = gated(ids, targets, loops=[3, 3], early_rows=[0, 1], early_by=2)
    output.halting_loss.backward()
    assert all(parameter.grad.any() for parameter in gated.halting.parameters())


def test_gate_sees_direction_and_relative_change_of_the_state(model: Build):
    gate = model(halting="gate").halting
    before, after = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    features = torch.cat(
        (after / after.square().mean(-1, keepdim=True).sqrt(),
         ((after - before).norm(dim=-1) / after.norm(dim=-1)).log().unsqueeze(-1)), dim=-1
    )  # fmt: skip
    hidden = features @ gate.hidden.T + gate.hidden_bias
    expected = (hidden * hidden.sigmoid()) @ gate.out + gate.out_bias
    torch.testing.assert_close(gate(before, after), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gate(7 * before, 7 * after), expected, rtol=1e-4, atol=1e-4)


def test_gate_finds_the_mean_of_noisy_divergences():
    """Two kinds of states whose divergences are 0.3 and 0.01 nats on average, each single one far from it."""
    generator = torch.Generator().manual_seed(0)
    gate = HaltingGate(8)
    initialize(gate, 0)
    kinds = torch.nn.functional.one_hot(torch.arange(2), 8).float()
    torch.testing.assert_close(gate(0 * kinds, kinds).exp(), torch.tensor([0.05, 0.05]))
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.01)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 600)
        kind = torch.randint(0, 2, (256,), generator=generator)
        divergence = torch.rand(256, generator=generator).pow(4) * 5 * torch.tensor([0.3, 0.01])[kind]
        optimizer.zero_grad()
        gate.loss(0 * kinds[kind], kinds[kind], divergence, torch.ones(256)).backward()
        optimizer.step()
    torch.testing.assert_close(gate(0 * kinds, kinds).exp(), torch.tensor([0.3, 0.01]), rtol=0.1, atol=0)


def test_gate_costs_at_most_five_percent_of_a_step(model: Build):
    """One row of eight is read out early; the head, which is read out for it twice, is as large as in a real model."""
    build = {"vocab_size": 2048, "loops": 8, "core_layers": 1}
    counts = {}
    for halting, early in (("none", {}), ("gate", {"early_rows": [3], "early_by": 4})):
        built, (ids, targets) = model(halting=halting, **build), inputs(64, 8)

        def step(built=built, ids=ids, targets=targets, early=early) -> None:
            built(ids, targets, loops=[8] * 8, backprop=4, **early).objective.backward()

        counts[halting] = executed_flops(step).total
    assert 0 < counts["gate"] / counts["none"] - 1 < 0.05, counts


def graves(states: Tensor, probabilities: Tensor) -> tuple[Tensor, float, list[float]]:
    """Average state (D,), ponder cost and weights of one position, from its states (T, D) and probabilities (T,)."""
    weights: list[float] = []
    for p in probabilities.tolist():
        if sum(weights) + p >= 0.99 or len(weights) == len(probabilities) - 1:
            weights.append(1 - sum(weights))
            break
        weights.append(p)
    average = sum(weight * state for weight, state in zip(weights, states, strict=False))
    return average, len(weights) + weights[-1], weights


@pytest.mark.parametrize("bias", [-30.0, -3.0, -1.0, 0.0, 1.0, 30.0])
def test_act_is_graves_mechanism(model: Build, bias: float):
    """Rows of several depths: logits, ponder cost, and weights that add up to 1 for every bias."""
    pondering, (ids, targets) = model(halting="act", ponder_weight=0.3), inputs()
    with torch.no_grad():
        pondering.halting.bias.fill_(bias)
        output = pondering(ids, targets, loops=DEPTHS)
        logits = pondering(ids, loops=DEPTHS).logits
    cost = 0.0
    for row, depth in enumerate(DEPTHS):
        states: list[Tensor] = []
        with torch.no_grad():
            losses = pondering.read_depths(
                ids[row : row + 1], targets[row : row + 1], [depth], observe=lambda s, kept=states: kept.append(s.state)
            )[0].losses
            probabilities = pondering.halting(torch.stack(states))[:, 0]
        averages = []
        for position in range(LENGTH):
            average, ponder, weights = graves(torch.stack(states)[:, 0, position], probabilities[:, position])
            assert sum(weights) == pytest.approx(1, abs=1e-6) and min(weights) >= 0
            averages.append(average)
            cost += ponder
        last = torch.stack(averages).unsqueeze(0)
        with torch.no_grad():
            expected = decoded(pondering, last)
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            losses.flatten(), F.cross_entropy(expected[0], targets[row], reduction="none"), rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(output.halting_loss, torch.tensor(0.3 * cost), rtol=1e-5, atol=1e-5)


def decoded(model: RecurrentDepthTransformer, state: Tensor) -> Tensor:
    hidden = model.decode(state, attention_context(model.config, state.shape[1], state.device, None))
    return F.linear(hidden, model.head_weight)


def test_act_trains_its_probabilities_and_the_ponder_cost_makes_them_grow(model: Build):
    pondering, (ids, targets) = model(halting="act", ponder_weight=1.0), inputs()
    output = pondering(ids, targets, loops=DEPTHS)
    [gradient] = torch.autograd.grad(output.halting_loss, pondering.halting.bias, retain_graph=True)
    assert gradient < 0, "a larger bias costs less"
    output.objective.backward()
    assert all(p.grad is not None and p.grad.any() for p in pondering.halting.parameters())


def test_act_decodes_as_graves_says(model: Build):
    """Without attention between positions, training and decoding are the same mechanism."""
    pondering = model(halting="act", core_layers=1)
    with torch.no_grad():
        for block in pondering.recurrence.blocks:
            block.attention.out.weight.zero_()
        pondering.halting.bias.fill_(-1.0)
    ids, _ = inputs()
    cache = DecodeCache(pondering.config, len(ids), loops=6)
    actual = pondering.extend(ids, cache, loops=6, halting=halting_rule(pondering, "act"), logits="all")
    unasked = pondering.extend(ids, DecodeCache(pondering.config, len(ids), loops=6), loops=6, logits="all")
    assert torch.equal(actual.logits, unasked.logits)
    with torch.no_grad():
        torch.testing.assert_close(actual.logits, pondering(ids, loops=6).logits, rtol=1e-5, atol=1e-5)
    assert 1 < actual.loops.float().mean() < 6


def test_act_starts_by_halting_after_the_trained_loops_on_average():
    halting = ActHalting(8, 5)
    initialize(halting, 0)
    with torch.no_grad():
        assert halting(torch.randn(3, 8)).tolist() == pytest.approx([1 / 5] * 3)


def test_rule_that_the_model_was_not_trained_for(model: Build):
    for name in ("gate", "act"):
        with pytest.raises(ValueError, match=f"got '{name}'.*trained with model.halting=convergence"):
            halting_rule(model(), name)
    with pytest.raises(ValueError, match=r"got 'convergence'.*trained with model.halting=act; allowed: act"):
        halting_rule(model(halting="act"), "convergence")
    assert type(halting_rule(model(halting="gate"))).__name__ == "Gate"
    assert type(halting_rule(model(halting="gate"), "convergence", 0.3)).__name__ == "Convergence"
    for threshold in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(ValueError, match="exit threshold of act"):
            halting_rule(model(halting="act"), "act", threshold)
