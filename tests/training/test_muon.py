"""Muon against its definition written out in float64, against torch's, and in what an update may not do."""

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from mythos.config.presets import preset_config
from mythos.config.sections import OptimConfig
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.training.muon import Muon
from mythos.training.optim import build_optimizer
from tests.runs import tiny
from tests.trainers import assert_identical, run, saved

LR, DECAY, MOMENTUM = 0.02, 0.3, 0.9


def orthogonal(matrix: Tensor) -> Tensor:
    """Five of Newton and Schulz's iterations, with the coefficients of Keller Jordan."""
    x = matrix.double() / max(matrix.double().square().sum().sqrt().item(), 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


def muon_step(weight: Tensor, gradient: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix alone: its next weight and momentum, float64."""
    momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
    nesterov = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
    scale = 0.2 * sqrt(max(weight.shape))
    return weight * (1 - LR * DECAY) - LR * scale * orthogonal(nesterov), momentum


def matrices(name: str, tensor: Tensor) -> list[Tensor]:
    """What is one matrix each: of every expert gate, up and down; of a feed-forward likewise."""
    alone = list(tensor) if tensor.ndim == 3 else [tensor]
    if "gate_up" not in name:
        return alone
    # Linear layers are (outputs, inputs), experts (inputs, outputs).
    return [half for matrix in alone for half in matrix.chunk(2, dim=1 if tensor.ndim == 3 else 0)]


def build(dtype: torch.dtype = torch.float32) -> tuple[RecurrentDepthTransformer, Muon]:
    model = RecurrentDepthTransformer(preset_config("mythos_nano", vocab_size=128)).initialize(0)
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=LR, weight_decay=DECAY, momentum=MOMENTUM), dtype)
    assert isinstance(optimizer, Muon)
    return model, optimizer


def hidden(model: nn.Module) -> dict[str, nn.Parameter]:
    layers = ("prelude.", "recurrence.blocks.", "coda.")
    return {n: p for n, p in model.named_parameters() if n.startswith(layers) and p.ndim > 1 and "router" not in n}


def draw_gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random gradients, by name; copies, because a step overwrites gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = 0.01 * torch.randn(parameter.shape, generator=generator)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_step_equals_muon_written_out():
    """Momentum, Nesterov, orthogonalisation, scale, decay, clipping and a skipped update; every expert alone."""
    model, optimizer = build()
    state = {
        name: [(part.detach().double(), torch.zeros_like(part, dtype=torch.float64)) for part in matrices(name, p)]
        for name, p in hidden(model).items()
    }
    assert len(state) == 20 and sum(map(len, state.values())) == 12 + 3 * 3 + 8 * 3
    for step in range(4):
        gradients = draw_gradients(model, seed=step)
        skipped = step == 2
        if skipped:
            model.prelude[0].ffn.down.weight.grad[3, 5] = float("nan")
            model.norm.weight.grad[0] = float("inf")
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(skipped)), torch.tensor(3.0 + step)
        before = [tensor.clone() for s in optimizer.state.values() for tensor in s.values()]
        optimizer.step()
        if skipped:
            after = [tensor for s in optimizer.state.values() for tensor in s.values()]
            assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        for name, parameter in hidden(model).items():
            if not skipped:
                parts = matrices(name, gradients[name].double() / (3.0 + step))
                state[name] = [muon_step(w, g, m) for (w, m), g in zip(state[name], parts, strict=True)]
            for part, (weight, _) in zip(matrices(name, parameter), state[name], strict=True):
                torch.testing.assert_close(part.double(), weight, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)


def test_equals_torch_where_it_has_one():
    """torch.optim.Muon is for matrices, in bfloat16."""
    model, optimizer = build(torch.bfloat16)
    weights = {name: p for name, p in hidden(model).items() if p.ndim == 2 and "gate_up" not in name}
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in weights.items()}
    settings = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon(copies.values(), **settings)
    for step in range(3):
        before = {name: p.detach().clone() for name, p in weights.items()}
        for name, gradient in draw_gradients(model, step).items():
            if name in copies:
                copies[name].grad = gradient
        optimizer.step()
        theirs.step()
        for name, weight in weights.items():
            torch.testing.assert_close(theirs.state[copies[name]], optimizer.state[weight], rtol=1e-6, atol=1e-9)
            moved, expected = weight - before[name], copies[name] - before[name]
            assert (moved - expected).norm() < 0.01 * expected.norm(), name
            weight.data.copy_(copies[name].data)


@pytest.mark.parametrize("shape", [(24, 24), (16, 56), (56, 16)])
def test_updates_are_nearly_orthogonal_and_as_large_as_those_of_adamw(shape):
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = Muon([{"params": [weight], "momentum": 0.0, "parts": 1}], torch.float32, lr=1.0, weight_decay=0.0)
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
    optimizer.step()
    update = -weight.detach()
    values = (left.T @ update @ right.T) / (0.2 * sqrt(max(shape)))  # in the gradient's own singular vectors
    assert ((values.diagonal() > 0.6) & (values.diagonal() < 1.3)).all()
    torch.testing.assert_close(values, values.diagonal().diag(), rtol=0, atol=1e-5)
    assert 0.15 < update.square().mean().sqrt() < 0.25


def test_without_a_gradient_nothing_moves():
    """An idle expert's matrices decay and no more."""
    model, optimizer = build()
    draw_gradients(model, 0)
    experts = model.recurrence.blocks[0].ffn.gate_up
    experts.grad[3] = 0.0
    before = experts.detach().clone()
    optimizer.step()
    torch.testing.assert_close(experts[3], before[3] * (1 - LR * DECAY))
    assert not torch.allclose(experts[2], before[2] * (1 - LR * DECAY), atol=1e-3)


def test_all_else_is_updated_by_adamw():
    model, optimizer = build()
    other = RecurrentDepthTransformer(preset_config("mythos_nano", vocab_size=128)).initialize(0)
    adamw = build_optimizer(other, OptimConfig(lr=LR, weight_decay=DECAY))
    for step in range(2):
        for one, its_optimizer in ((model, optimizer), (other, adamw)):
            draw_gradients(one, step)
            its_optimizer.step()
    matrices, others = hidden(model), dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, others[name]) == (name not in matrices), name
        assert optimizer.state[parameter].keys() == (
            {"momentum_buffer"} if name in matrices else {"step", "exp_avg", "exp_avg_sq"}
        )


@pytest.mark.usefixtures("no_plots")
def test_continues_exactly(tmp_path):
    """Two steps, saved, and two more by another run are bit for bit the four of one run."""
    changes = {"optim__name": "muon", "train__steps": 4, "checkpoint__every": 2, "eval__batches": 1}
    whole = run(tiny(tmp_path, **changes))
    again = tiny(tmp_path, **changes, run__dir=str(tmp_path / "again"), run__resume=str(saved(whole, 2)))
    assert_identical(whole, run(again))
