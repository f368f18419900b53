"""The recurrent-depth transformer; reading data for it needs this much of it and no more, for imports take seconds."""

IGNORE_INDEX = -100
"""The target of a position that asks for nothing."""
