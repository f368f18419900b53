"""The looped state: where it starts, what a pass leaves, and measurements of it."""

from collections.abc import Sequence
from hashlib import blake2b
from math import erf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from mythos.model.config import ModelConfig


class LoopState(NamedTuple):  # a tuple, because FSDP looks for tensors in what a module returns
    """The recurrence after one pass, for the n rows that were active in it."""

    loop: int
    """Passes done, counted for the deepest row; with `loop_over: layer` those of the layer."""
    state: Tensor
    """(n, S, D) float32."""
    previous: Tensor
    """State before the pass, (n, S, D)."""
    slots: Tensor
    """Loop index of each row in this pass, (n,) int64."""
    experts: list[Tensor]
    """Chosen experts of each routed core block of the pass, (n, S, k) int64."""
    layer: int = 0
    """Index of the pass's first core block: 0, or with `loop_over: layer` that of its only one."""


def initial_state(
    config: ModelConfig, rows: Sequence[int], length: int, *, seed: int, step: int, device: torch.device
) -> Tensor:
    """h_0 of training: (len(rows), length, D) float32; each row is a function of (seed, step, global row).

    Truncated-normal noise of std sqrt(2 / (5 D)), or zeros with `state_init: zero`. The values of a row do not depend
    on its micro-batch or rank. They do depend on the device type, whose generator draws them.
    """
    state = torch.zeros(len(rows), length, config.dim, device=device)
    if config.state_init == "normal" and config.injection != "none":
        std = sqrt(2 / (5 * config.dim))
        within = erf(3 / sqrt(2))  # share of a normal distribution within three standard deviations
        generator = torch.Generator(device)
        for row, row_state in zip(rows, state, strict=True):
            digest = blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(digest) >> 1)
            # Inverse distribution function: nn.init.trunc_normal_ redraws until all values fit, which waits for the
            # GPU.
            row_state.uniform_(-within, within, generator=generator).erfinv_().mul_(sqrt(2) * std)
    return state


@torch.no_grad()
def state_measures(last: LoopState) -> tuple[Tensor, Tensor]:
    """Means over positions of log ||h_t|| and of ||h_t - h_{t-1}|| / ||h_t||, two float32 scalars."""
    norm = last.state.norm(dim=-1)
    change = (last.state - last.previous).norm(dim=-1)
    return norm.log().mean(), (change / norm).mean()


@torch.no_grad()
def add_load(load: Tensor, after: LoopState) -> None:
    """Add the tokens that a pass sent to each expert to `load` (core layers, loop indices, E) int64.

    Loops beyond the last index count there.
    """
    _, slots, experts = load.shape
    ran = load[after.layer : after.layer + len(after.experts)]
    for layer_load, chosen in zip(ran, after.experts, strict=True):
        cell = after.slots.clamp(max=slots - 1)[:, None, None] * experts + chosen  # (n, S, k)
        layer_load.view(-1).scatter_add_(0, cell.flatten(), layer_load.new_ones(()).expand(cell.numel()))


def chosen_overlap(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Share of the experts chosen in a pass that the pass before chose too; mean over layers, positions and k; scalar.

    before and after are `LoopState.experts` of two passes.
    """
    shares = [
        (new.unsqueeze(-1) == old.unsqueeze(-2)).any(-1).float().mean() for old, new in zip(before, after, strict=True)
    ]
    return torch.stack(shares).mean()
