"""Errors that a person can act on, and how messages are shown: short, and without credentials."""

import logging
import re
import sys
from importlib import import_module
from types import ModuleType
from typing import Any, TextIO


class MythosError(Exception):
    """Invalid input. The message says what was given, what is allowed and what to do; entry points print it and exit 1.

    Credentials in the message's URLs are replaced, because messages are printed, logged and mailed.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*map(without_credentials, args))


class DivergedError(MythosError):
    """A training whose loss or gradient is not finite any more."""


class TransientError(MythosError):
    """A failure that a restart may avoid: another process was lost, a server did not answer."""


class DiskFullError(MythosError):
    """A full disk, or a quota that is used up."""


def short_reason(error: BaseException) -> str:
    """The first line of another library's error, for a message of ours; the error's type if it has no text."""
    return without_credentials(str(error).splitlines()[0]) if str(error) else type(error).__name__


class StandardError(logging.StreamHandler[TextIO]):
    """Writes to what is standard error at the time: a training run's display replaces it, to keep its lines whole."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stderr
        super().emit(record)


class _WithoutCredentials(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def log_messages() -> None:
    """Write warnings and errors of all libraries to standard error, with the credentials in URLs replaced."""
    handler = StandardError()
    handler.setFormatter(_WithoutCredentials("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])


def without_credentials(value: Any) -> Any:
    """Replace user names, passwords and queries in the URLs of a value's strings by `***`.

    The whole query is replaced, because servers use too many names for signatures and tokens to list them.
    """
    if isinstance(value, dict):
        return {key: without_credentials(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_credentials(item) for item in value]
    if isinstance(value, str):
        value = re.sub(r"://[^/\s]*@", "://***@", value)
        return re.sub(r"(://[^?#\s]*[?#])[^\s]*=[^\s]*", r"\1***", value)
    return value


def import_optional(package: str, needed_by: str) -> ModuleType:
    """Import a package that most runs do not need.

    Raises MythosError that names `needed_by` (a field or a command) and the command that installs the package.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MythosError(
            f"{needed_by} needs the package {package}, which cannot be imported ({short_reason(error)}): run "
            f"`pip install {package}`"
        ) from error
