"""How the next token is drawn from logits: temperature, truncation, repetition penalty, a seed for every row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What shapes the distribution that a token is drawn from; applied in the order of the fields.

    Raises ValueError for a value outside of its range.
    """

    repetition_penalty: float = 1.0
    """Logits of ids that the row has already are divided by it where positive and multiplied where negative
    (arXiv 1909.05858); above 0, 1 = off."""
    temperature: float = 0.8
    """Logits are divided by it; at least 0, and 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest ids; at least 1, None = all."""
    top_p: float | None = None
    """Keep the fewest likeliest ids that hold this share of what is left (arXiv 1904.09751); in (0, 1], None = all."""
    min_p: float | None = None
    """Keep ids at least this share as likely as the likeliest (arXiv 2407.01082); in (0, 1], None = all."""

    def __post_init__(self) -> None:
        """Check every field."""
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition penalty: got {self.repetition_penalty}; allowed: above 0 (1 = off)")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: got {self.temperature}; allowed: at least 0 (0 = the likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k: got {self.top_k}; allowed: at least 1")
        for name, share in (("top-p", self.top_p), ("min-p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}: got {share}; allowed: above 0 and at most 1")

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueError if more ids are to be kept than there are."""
        if self.top_k is not None and self.top_k > size:
            raise ValueError(f"top-k: got {self.top_k}; allowed: at most the vocabulary, {size}")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def draw(self, logits: Tensor, uniform: Tensor, seen: Tensor | None = None) -> Tensor:
        """One id for every row: logits (B, V) float32 -> (B,) int64, without waiting for the device.

        `uniform` is (B,) float64 in [0, 1): the place in the cumulative distribution, likeliest id first, that is
        drawn. `seen` is (B, V) bool, True at ids that the repetition penalty is for, or None.
        """
        if seen is not None:
            penalty = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.greedy:
            return logits.argmax(-1)
        candidates, share = self.truncate(logits)
        # In float64, for a float32 sum of a large vocabulary loses its tail.
        total = share.cumsum(-1)
        place = (total <= uniform.unsqueeze(-1) * total[:, -1:]).sum(-1, keepdim=True)
        # Rounding may reach the end of the sum: then the last id that is kept is meant. (None is kept of NaN.)
        place = place.minimum((share > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
        return candidates.gather(-1, place).squeeze(-1)

    def truncate(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates of every row, likeliest first, and their shares: (B, n) int64 and (B, n) float64.

        Shares of ids that are not kept are 0; the others are probabilities up to a factor.
        """
        if self.top_k is not None:
            best, candidates = logits.topk(self.top_k, dim=-1)
        else:
            best, candidates = logits.sort(dim=-1, descending=True, stable=True)
        share = (best.double() / self.temperature).softmax(-1)
        if self.top_p is not None:
            before = share.cumsum(-1) - share
            share = share.masked_fill(before >= self.top_p, 0.0)
        if self.min_p is not None:
            share = share.masked_fill(share < self.min_p * share[:, :1], 0.0)
        return candidates, share


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(rows, count) float64 in [0, 1) on the host: number n of a row is a function of (its seed, n) alone.

    Raises ValueError for a negative seed.
    """
    for seed in seeds:
        if seed < 0:
            raise ValueError(f"seed: got {seed}; allowed: 0 and above")
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(count) for seed in seeds]))
