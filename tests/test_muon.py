"""Muon against its definition written out in float64, against torch's, and in what an update may not do."""

from math import sqrt

import torch
from torch import Tensor, nn

from mythos.config import OptimConfig
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.muon import Muon
from mythos.optim import build_optimizer
from mythos.presets import preset_config

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
    """Random gradients, by name; copies, for a step uses up those it is given."""
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
