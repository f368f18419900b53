"""Fixtures of plans."""

import pytest

from mythos.planning import rank_state as states
from mythos.planning.memory import Activations


@pytest.fixture
def no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan layouts without activations."""
    monkeypatch.setattr(states, "step_activations", lambda model, step: Activations(0, 0))
