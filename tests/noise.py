"""Reproducible noise, for tests whose model must not be at its starting values."""

import zlib

import torch


def name_generator(seed: int, name: str) -> torch.Generator:
    """CPU generator of one tensor, a function of (seed, name)."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
