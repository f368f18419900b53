"""Injections against their formulas, and the bounds of what they keep of the state."""

import math

import pytest
import torch
from torch import Tensor, nn

from mythos.model.injection import InitialInjection, LinearInjection, LTIInjection, OrthogonalInjection
from mythos.model.rdt import RecurrentDepthTransformer
from tests.model.conftest import scrambled
from tests.model.test_recurrence import DEPTHS, inputs


def test_injection_follows_its_formula(small):
    injection = scrambled(LTIInjection(small(dim=6)))
    generator = torch.Generator().manual_seed(0)
    e, state = torch.randn(2, 3, 6, generator=generator), torch.randn(2, 3, 6, generator=generator)
    decay, injected = injection(e)
    actual = injection.combine(state, decay, injected, torch.tensor([0]))
    for row in range(2):
        for position in range(3):
            for d in range(6):
                delta = math.log1p(math.exp(injection.dt[d].item()))
                a = math.exp(-delta * math.exp(injection.log_a[d].item()))
                be = sum(injection.weight[d, k].item() * e[row, position, k].item() for k in range(6))
                expected = a * state[row, position, d].item() + delta * be
                assert actual[row, position, d].item() == pytest.approx(expected, abs=1e-5)


def test_orthogonal_injection_follows_its_formula(small):
    """Entry by entry; what it keeps of the state has no part along what it injects."""
    injection = scrambled(OrthogonalInjection(small(dim=6)))
    generator = torch.Generator().manual_seed(0)
    e, state = torch.randn(2, 3, 6, generator=generator), torch.randn(2, 3, 6, generator=generator)
    actual = injection.combine(state, *injection(e), torch.tensor([0]))
    for row in range(2):
        for position in range(3):
            kept, added = [], []
            for d in range(6):
                delta = math.log1p(math.exp(injection.dt[d].item()))
                kept.append(math.exp(-delta * math.exp(injection.log_a[d].item())) * state[row, position, d].item())
                be = sum(injection.weight[d, k].item() * e[row, position, k].item() for k in range(6))
                added.append(delta * be)
            along = sum(a * b for a, b in zip(kept, added, strict=True)) / (sum(b * b for b in added) + 1e-6)
            result = actual[row, position].tolist()
            assert abs(along) > 1e-3
            assert result == pytest.approx([a - along * b + b for a, b in zip(kept, added, strict=True)], abs=1e-5)
            rest = sum((u - b) * b for u, b in zip(result, added, strict=True))
            assert rest == pytest.approx(0, abs=1e-5)


def test_orthogonal_injection_shrinks_every_state_at_least_as_much_as_its_decay_says(small):
    """Whatever is injected, nothing included: the largest singular value of a pass, and of four passes."""
    injection = scrambled(OrthogonalInjection(small(dim=6)), 1.0).double()
    decay = injection.decay()
    for scale in (0.0, 1e-4, 1.0, 100.0):
        added = scale * torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(1)).double()

        def passed(state: Tensor, added: Tensor = added) -> Tensor:
            return injection.combine(state.view(1, 1, 6), decay, added, torch.tensor([0])).flatten()

        jacobian = torch.func.jacrev(passed)(torch.zeros(6, dtype=torch.float64))
        norms = [torch.linalg.matrix_norm(power, 2) for power in (jacobian, torch.linalg.matrix_power(jacobian, 4))]
        assert norms[0] <= decay.max() + 1e-12 and norms[1] <= decay.max() ** 4 + 1e-12
        if scale == 0:
            torch.testing.assert_close(jacobian, torch.diag(decay))


@pytest.mark.parametrize("injection", ["lti", "orthogonal"])
def test_injection_starts_where_the_design_says(small, injection):
    model = RecurrentDepthTransformer(small(injection=injection)).initialize(0)
    injection = model.recurrence.injection
    torch.testing.assert_close(injection.decay(), torch.full((32,), math.sqrt(0.2)))
    torch.testing.assert_close(injection.rates()[1], torch.full((32,), -math.log(math.sqrt(0.2))))
    assert torch.equal(injection.weight, torch.eye(32))


def test_lanes_start_with_memories_of_different_lengths(small):
    """A_k = sqrt(1/5)^(1/(k+1)): lane k keeps over k + 1 passes what the first keeps over one."""
    model = RecurrentDepthTransformer(small(dim=6, lanes=3)).initialize(0)
    decay, delta = model.recurrence.injection.rates()
    for lane, (a, step) in enumerate(zip(decay.tolist(), delta.tolist(), strict=True)):
        assert [value ** (lane + 1) for value in a] == pytest.approx([0.2**0.5] * 6, rel=1e-5)
        assert step == pytest.approx([-math.log(0.2**0.5) / (lane + 1)] * 6, rel=1e-5)


def test_linear_add_and_initial_injections(small):
    linear, loop = scrambled(LinearInjection(small(dim=6))), torch.tensor([1, 0])
    e, state = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    expected = state @ linear.state.weight.T + e @ linear.input.weight.T
    torch.testing.assert_close(linear.combine(state, *linear(e), loop), expected, rtol=1e-5, atol=1e-5)
    add = RecurrentDepthTransformer(small(injection="add")).recurrence.injection
    torch.testing.assert_close(add.combine(state, *add(e), loop), state + e)
    initial = scrambled(InitialInjection(small(dim=6)))
    combined = initial.combine(state, *initial(e), loop)
    normed = state[0] / (state[0].square().mean(-1, keepdim=True) + 1e-6).sqrt() * initial.norm.weight
    torch.testing.assert_close(combined[0], normed, rtol=1e-5, atol=1e-5)
    assert torch.equal(combined[1], e[1])


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize(
    ("fused", "changes"),
    [(True, {}), (False, {}), (True, {"injection": "orthogonal", "loop_over": "layer"})],
    ids=str,
)
def test_spectral_radius_below_one_after_a_huge_step(model, direction, fused, changes):
    model = model(**changes)
    injection = model.recurrence.injection
    ids, targets, state = inputs(model)
    optimizer = torch.optim.AdamW(injection.parameters(), lr=1e4, fused=fused)
    model(ids, targets, loops=DEPTHS, state=state).loss.mul(direction).backward()
    optimizer.step()
    assert injection.dt.abs().max() > 9e3
    radius = model.spectral_radius()
    assert radius.dtype == torch.float32
    assert 0 < injection.decay().min() <= radius < 1
    for dt in (-1e4, 1e4):
        for log_a in (-1e4, 1e4):
            nn.init.constant_(injection.dt, dt)
            nn.init.constant_(injection.log_a, log_a)
            assert 0 < injection.decay().min() <= model.spectral_radius() < 1


@pytest.mark.parametrize("dt", [-30.0, 30.0])
@pytest.mark.parametrize("log_a", [-30.0, 30.0])
def test_parameters_outside_their_bounds_can_be_trained_back(small, dt, log_a):
    injection = LTIInjection(small(dim=4))
    nn.init.constant_(injection.dt, dt)
    nn.init.constant_(injection.log_a, log_a)
    optimizer = torch.optim.Adam((injection.dt, injection.log_a), lr=0.3)
    for _ in range(500):
        optimizer.zero_grad()
        decay, delta = injection.rates()
        ((decay - 0.5).square() + (delta - 1).square()).sum().backward()
        optimizer.step()
    torch.testing.assert_close(injection.decay(), torch.full((4,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(injection.rates()[1], torch.full((4,), 1.0), atol=0.01, rtol=0)


@pytest.mark.parametrize(("dt", "log_a"), [(7.0, 3.0), (7.0, -7.0), (-7.0, 3.0), (-7.0, -7.0)])
def test_parameters_outside_their_bounds_are_not_driven_further(small, dt, log_a):
    injection = LTIInjection(small(dim=4))
    nn.init.constant_(injection.dt, dt)
    nn.init.constant_(injection.log_a, log_a)
    decay, delta = injection.rates()  # Delta rises with dt, A falls with log_a
    outward = math.copysign(1.0, log_a) * decay - 10 * math.copysign(1.0, dt) * delta
    outward.sum().backward()
    assert not injection.log_a.grad.any()
    assert not injection.dt.grad.any()


@pytest.mark.parametrize("weight", [-1000.0, -100.0])
def test_gradient_of_dt_outside_its_bound_is_judged_as_a_whole(small, weight):
    """Through A it leads inside, through Delta outside; which of both is stronger decides."""
    injection = LTIInjection(small(dim=4))
    nn.init.constant_(injection.dt, 7.0)
    nn.init.zeros_(injection.log_a)
    decay, delta = injection.rates()
    (weight * decay - delta).sum().backward()
    whole = (-weight * math.exp(-math.log1p(math.exp(6.0))) - 1) / (1 + math.exp(-6.0))
    expected = torch.full((4,), max(whole, 0.0))
    assert (whole > 0) == (weight == -1000)
    torch.testing.assert_close(injection.dt.grad, expected, rtol=1e-4, atol=1e-6)
