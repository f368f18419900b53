"""Random bits of generated sequences: functions of keys alone, the same in every version of this project.

Shape suffix: R rows (sequences).
"""

import hashlib

import numpy as np

# Increment and multipliers of SplitMix64.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mixed(values: np.ndarray) -> np.ndarray:
    """64 well-mixed bits of every value: uint64 to uint64 of the same shape (the finaliser of SplitMix64).

    Written out here, because a library's generator may change with its version, and a run that resumes after an upgrade
    must continue with the same sequences.
    """
    with np.errstate(over="ignore"):
        values = values + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * _MIX[0]
        values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))


class Draws:
    """Independent random bits for every row. Each call draws new ones, so the order of calls matters.

    `keys` are uint64 (rows,); equal keys draw equally.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = mixed(keys)
        self._drawn = 0

    def bits(self, count: int) -> np.ndarray:
        """uint64 (rows, count)."""
        numbers = np.arange(self._drawn, self._drawn + count, dtype=np.uint64)
        self._drawn += count
        with np.errstate(over="ignore"):
            return mixed(self._keys[:, None] + numbers * _GOLDEN)

    def integers(self, below: int, count: int) -> np.ndarray:
        """Uniform 0..below - 1, int64 (rows, count)."""
        return (self.bits(count) % np.uint64(below)).astype(np.int64)

    def permutations(self, size: int) -> np.ndarray:
        """Uniform permutations of 0..size - 1, int64 (rows, size)."""
        return np.argsort(self.bits(size), axis=1, kind="stable")


def sequence_keys(name: str, numbers: np.ndarray) -> np.ndarray:
    """Keys of numbered sequences, uint64, different for every name."""
    base = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), "<u8")
    return mixed(base) + numbers.astype(np.uint64)
