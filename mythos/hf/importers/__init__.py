"""Architectures of published looped models that `mythos import` can import, one per module."""

from mythos.errors import MythosError
from mythos.hf.importers.architecture import Architecture, Values
from mythos.hf.importers.huginn import HUGINN
from mythos.hf.importers.ouro import OURO
from mythos.hf.importers.parcae import PARCAE

KNOWN: tuple[Architecture, ...] = (PARCAE, HUGINN, OURO)


def architecture_of(values: Values) -> Architecture:
    """The architecture of a config.json. Raises MythosError, listing the known ones, for any other."""
    for architecture in KNOWN:
        if architecture.recognises(values):
            return architecture
    names = ("model_type", "architectures", "_class_name")
    identity = ", ".join(f"{name} {values[name]!r}" for name in names if values.get(name))
    known = "; ".join(f"{architecture.name} ({architecture.models})" for architecture in KNOWN)
    raise MythosError(f"an architecture that is not known: {identity or 'its config.json names none'}; known: {known}")
