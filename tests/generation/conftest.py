"""Fixtures of the model's tests."""

from tests.model.conftest import model, small

__all__ = ["model", "small"]
