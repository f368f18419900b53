"""Architectures of published looped models that can be imported, one a module; `mythos import` uses them."""

from mythos.errors import MythosError
from mythos.hf.importers.architecture import Architecture, Values
from mythos.hf.importers.huginn import HUGINN
from mythos.hf.importers.ouro import OURO
from mythos.hf.importers.parcae import PARCAE

KNOWN: tuple[Architecture, ...] = (PARCAE, HUGINN, OURO)


def architecture_of(values: Values) -> Architecture:
    """The architecture that a config.json is of. Raises MythosError, with those that are known, for any other."""
    for architecture in KNOWN:
        if architecture.recognises(values):
            return architecture
    told = {name: values[name] for name in ("model_type", "architectures", "_class_name") if values.get(name)}
    known = "; ".join(f"{architecture.name} ({architecture.models})" for architecture in KNOWN)
    raise MythosError(
        f"an architecture that is not known: {', '.join(f'{n} {v!r}' for n, v in told.items()) or 'it says none'}; "
        f"known: {known}"
    )
