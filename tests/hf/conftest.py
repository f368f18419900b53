from collections.abc import Callable

import pytest

from mythos.hf import MythosConfig, MythosForCausalLM
from tests.model.conftest import SMALL, scrambled

CONTEXT = 40
VOCABULARY = 100
"""Less than the 128 rows that the embedding is padded to."""


@pytest.fixture(scope="session")
def made() -> Callable[..., MythosForCausalLM]:
    """Build a small model in eval mode whose weights are all seeded noise, fields replaced by name."""

    def build(**changes: object) -> MythosForCausalLM:
        config = MythosConfig(**{**SMALL, "vocab_size": VOCABULARY, "context_length": CONTEXT, **changes})
        return scrambled(MythosForCausalLM(config), 0.15).eval()

    return build


@pytest.fixture(scope="session")
def model(made: Callable[..., MythosForCausalLM]) -> MythosForCausalLM:
    """One that no test changes."""
    return made()
