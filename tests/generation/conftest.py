"""Fixtures shared with the tests of the model."""

from tests.model.conftest import model, small

__all__ = ["model", "small"]
