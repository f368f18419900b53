"""The error a person can act on."""


class MythosError(Exception):
    """Bad input. The message says what was given, what is allowed and what to do; entry points print it and exit 1."""
