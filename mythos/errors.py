"""The errors a person can act on."""

from importlib import import_module
from types import ModuleType


class MythosError(Exception):
    """Bad input. The message says what was given, what is allowed and what to do; entry points print it and exit 1."""


class TransientError(MythosError):
    """What a restart may not meet again: another process was lost, a server did not answer."""


class DiskFullError(MythosError):
    """What free space would mend: a disk is full, or a quota is used up."""


def short_reason(error: BaseException) -> str:
    """The first line of another library's error, or its type where it says nothing: what fits in a message of ours."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def import_optional(package: str, needed_by: str) -> ModuleType:
    """Import a package that most runs do without.

    Raises MythosError that names `needed_by`, a field or a command, and how to install the package.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MythosError(
            f"{needed_by} needs the package {package}, which cannot be imported ({short_reason(error)}): run "
            f"`pip install {package}`"
        ) from error
