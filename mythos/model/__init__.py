"""The recurrent-depth transformer. This file stays free of torch: the data modules need only `IGNORE_INDEX`."""

IGNORE_INDEX = -100
"""Target of a position without loss; torch's default."""
