"""The errors a person can act on."""


class MythosError(Exception):
    """Bad input. The message says what was given, what is allowed and what to do; entry points print it and exit 1."""


class TransientError(MythosError):
    """What a restart may not meet again: another process was lost, a server did not answer."""


def short_reason(error: BaseException) -> str:
    """The first line of another library's error, or its type where it says nothing: what fits in a message of ours."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
