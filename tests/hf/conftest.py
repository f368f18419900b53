from collections.abc import Callable

import pytest

from mythos.hf import MythosConfig, MythosForCausalLM
from tests.model.conftest import SMALL, scrambled

CONTEXT = 40
VOCABULARY = 100
"""Smaller than 128, the number of rows that the embedding is padded to."""


@pytest.fixture(scope="session")
def build_model() -> Callable[..., MythosForCausalLM]:
    """Build a small model in eval mode with seeded noise in every weight; keyword arguments set fields."""

    def build(**changes: object) -> MythosForCausalLM:
        config = MythosConfig(**{**SMALL, "vocab_size": VOCABULARY, "context_length": CONTEXT, **changes})
        return scrambled(MythosForCausalLM(config), 0.15).eval()

    return build


@pytest.fixture(scope="session")
def model(build_model: Callable[..., MythosForCausalLM]) -> MythosForCausalLM:
    """A model that no test changes."""
    return build_model()
