"""The learning rate of every step."""

from math import cos, pi

from mythos.config.sections import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of 0-based `step`: linear warmup from 0, then cosine or warmup-stable-decay over `steps` in all.

    Steps beyond `steps` keep the last value.
    """
    warmup = config.warmup * steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1.0, steps - 1 - warmup)
        share = (1 + cos(pi * min(1.0, progress))) / 2
    else:
        share = min(1.0, max(0, steps - 1 - step) / max(1.0, config.decay * steps))
    return config.lr * (config.min_lr + (1 - config.min_lr) * share)
