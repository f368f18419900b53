"""Sampling of the next token: temperature, truncation, repetition penalty, and one seed per row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST_PENALTY = 1e9
"""Largest repetition penalty, and the inverse of the smallest: logits stay finite in float32."""
LEAST_TEMPERATURE = 1e-30
"""Lower temperatures are raised to this one, which always takes the likeliest token: quotients stay finite."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the distribution of the next token, applied in the order of the fields.

    Raises ValueError for a value out of range.
    """

    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of ids that are already in the row (arXiv 1909.05858);
    1e-9 to 1e9, 1 = off."""
    temperature: float = 0.8
    """Divides the logits; at least 0, and 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest ids; at least 1, None = all."""
    top_p: float | None = None
    """Keep the fewest likeliest ids that have this total probability (arXiv 1904.09751); in (0, 1], None = all."""
    min_p: float | None = None
    """Keep ids at least this many times as probable as the likeliest (arXiv 2407.01082); in (0, 1], None = all."""

    def __post_init__(self) -> None:
        """Check every field."""
        if not 1 / MOST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            raise ValueError(
                f"repetition penalty: got {self.repetition_penalty}; allowed: {1 / MOST_PENALTY:g} to "
                f"{MOST_PENALTY:g} (1 = off)"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: got {self.temperature}; allowed: at least 0 (0 = the likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k: got {self.top_k}; allowed: at least 1")
        for name, share in (("top-p", self.top_p), ("min-p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}: got {share}; allowed: above 0 and at most 1")

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueError if top_k exceeds the vocabulary."""
        if self.top_k is not None and self.top_k > size:
            raise ValueError(f"top-k: got {self.top_k}; allowed: at most the vocabulary, {size}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    def draw(self, logits: Tensor, uniform: Tensor, seen: Tensor | None = None) -> Tensor:
        """Draw one id per row: logits (B, V) float32 -> (B,) int64, without waiting for the device.

        `uniform` is (B,) float64 in [0, 1): the quantile to take from the distribution sorted by probability, likeliest
        id first. `seen` is (B, V) bool, True at ids that the repetition penalty applies to, or None.
        """
        if seen is not None:
            penalty = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.greedy:
            return logits.argmax(-1)
        candidates_BV, weights_BV = self.truncate(logits)
        # In float64: a float32 cumulative sum over a large vocabulary loses its tail.
        cumulative_BV = weights_BV.cumsum(-1)
        index_B1 = (cumulative_BV <= uniform.unsqueeze(-1) * cumulative_BV[:, -1:]).sum(-1, keepdim=True)
        # Rounding may go past the end of the sum: take the last id that is kept. (With NaN logits none is kept.)
        index_B1 = index_B1.minimum((weights_BV > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
        return candidates_BV.gather(-1, index_B1).squeeze(-1)

    def truncate(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates of every row, likeliest first, and their weights: (B, n) int64 and (B, n) float64.

        Weights are probabilities up to a factor per row, and 0 for ids that are not kept.
        """
        if self.top_k is not None:
            best, candidates = logits.topk(self.top_k, dim=-1)
        else:
            best, candidates = logits.sort(dim=-1, descending=True, stable=True)
        weights = (best.double() / max(self.temperature, LEAST_TEMPERATURE)).softmax(-1)
        if self.top_p is not None:
            likelier = weights.cumsum(-1) - weights  # total probability of the ids before this one
            weights = weights.masked_fill(likelier >= self.top_p, 0.0)
        if self.min_p is not None:
            weights = weights.masked_fill(weights < self.min_p * weights[:, :1], 0.0)
        return candidates, weights


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(rows, count) float64 in [0, 1) on the host; entry n of a row depends only on (the row's seed, n).

    Raises ValueError for a negative seed.
    """
    for seed in seeds:
        if seed < 0:
            raise ValueError(f"seed: got {seed}; allowed: 0 and above")
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(count) for seed in seeds]))
