"""Computes the order of samples, which is an endless sequence of shuffled epochs with random access.

Each epoch is a permutation of the samples, computed by a small keyed Feistel network over Python integers. The
computation has no state. So each rank computes the sample at any position directly, also after a restart.

The algorithm is from Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 5 (generalised Feistel) and
section 3 (cycle walking).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

ROUNDS = 8
WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Shuffled:
    """The order of the samples of a source with a known `size`. Each epoch has a different permutation."""

    seed: int | str
    size: int

    def sample_at(self, position: int) -> int:
        """The index of the sample at `position` in the sequence of the source's samples."""
        return sample_at(self.seed, position, self.size)

    def epoch_at(self, position: int) -> float:
        """The number of epochs (with a fraction) before `position`."""
        return position / self.size


@dataclass(frozen=True)
class Streamed:
    """The order of the samples of a stream, which is still read while training runs.

    Blocks of `block` samples are in the order of the text. The samples within a block are shuffled, differently in each
    epoch. The order is a pure function of the position, and does not depend on how many samples have been read.

    `arrived(n)` waits until n samples have been read, and returns the total number of samples, or None if it is not yet
    known."""

    seed: int | str
    block: int
    arrived: Callable[[int], int | None]

    def sample_at(self, position: int) -> int:
        """The index of the sample at `position` in the sequence of samples. The call waits until its block is read.

        Raises: UserError if the block cannot be read."""
        size = self.arrived((position // self.block + 1) * self.block)
        epoch, offset = (0, position) if size is None else divmod(position, size)
        first = offset // self.block * self.block
        count = self.block if size is None else min(self.block, size - first)
        return first + sample_at(f"{self.seed} {first}", epoch * count + offset - first, count)

    def epoch_at(self, position: int) -> float:
        """The number of epochs (with a fraction) before `position`, or 0 while the size of the source is unknown."""
        size = self.arrived(0)
        return position / size if size else 0.0


def sample_at(seed: int | str, position: int, size: int) -> int:
    """The index (0 to `size` − 1) of the sample at `position` of the endless shuffled sequence.

    Each epoch has `size` positions and contains every sample once."""
    epoch, index = divmod(position, size)
    keys = _round_keys(seed, epoch)
    left_size = math.isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    index = _permute(index, left_size, right_size, keys)
    while index >= size:  # the permutation covers left × right ≥ size indices, so repeat it until the index is valid
        index = _permute(index, left_size, right_size, keys)
    return index


def _permute(index: int, left_size: int, right_size: int, keys: tuple[int, ...]) -> int:
    """A keyed permutation of the integers below `left_size` · `right_size`, computed by a Feistel network."""
    right, left = divmod(index, left_size)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right ^ key)) % left_size
        else:
            right = (right + _mix(left ^ key)) % right_size
    return right * left_size + left


def _mix(word: int) -> int:
    """A hash of 64 bits to 64 bits, which is the finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


@lru_cache(maxsize=8)
def _round_keys(seed: int | str, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * number : 8 * number + 8], "little") for number in range(ROUNDS))
