"""The order of samples: an endless sequence of shuffled epochs with random access.

Each epoch is a permutation of the samples, computed by a small keyed Feistel network over Python integers. There is no
state and no sequential drawing, so every rank, layout and restart computes only the positions it needs.

Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 5 (generalised Feistel) and section 3
(cycle walking).
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
    """The order of a complete source of `size` samples: a different permutation in each epoch."""

    seed: int | str
    size: int

    def sample_at(self, position: int) -> int:
        """The index of the sample at a position of the source's sequence."""
        return sample_at(self.seed, position, self.size)

    def epoch_at(self, position: int) -> float:
        """The number of epochs before `position`."""
        return position / self.size


@dataclass(frozen=True)
class Streamed:
    """The order of a source that is still arriving: blocks of `block` samples in the order of the text, shuffled within
    each block, differently in each epoch. A pure function of the position, independent of how much has arrived.

    `arrived(n)` waits for n samples and returns the source's size if it is known, else None."""

    seed: int | str
    block: int
    arrived: Callable[[int], int | None]

    def sample_at(self, position: int) -> int:
        """The index of the sample at a position of the source's sequence. Waits for its block.

        Raises: UserError if the block cannot arrive."""
        size = self.arrived((position // self.block + 1) * self.block)
        epoch, offset = (0, position) if size is None else divmod(position, size)
        first = offset // self.block * self.block
        count = self.block if size is None else min(self.block, size - first)
        return first + sample_at(f"{self.seed} {first}", epoch * count + offset - first, count)

    def epoch_at(self, position: int) -> float:
        """The number of epochs before `position`; 0 while the size is unknown."""
        size = self.arrived(0)
        return position / size if size else 0.0


def sample_at(seed: int | str, position: int, size: int) -> int:
    """The sample, 0 to `size` − 1, at `position` of the shuffled sequence.

    An epoch, `size` positions from a multiple of `size` on, holds every sample once."""
    epoch, index = divmod(position, size)
    keys = _round_keys(seed, epoch)
    left_size = math.isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    index = _permute(index, left_size, right_size, keys)
    while index >= size:  # the network permutes left × right ≥ size indices; repeat it until the index is below size
        index = _permute(index, left_size, right_size, keys)
    return index


def _permute(index: int, left_size: int, right_size: int, keys: tuple[int, ...]) -> int:
    """A keyed bijection of 0 to `left_size` · `right_size` − 1: each half in turn is shifted by a hash of the other."""
    right, left = divmod(index, left_size)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right ^ key)) % left_size
        else:
            right = (right + _mix(left ^ key)) % right_size
    return right * left_size + left


def _mix(word: int) -> int:
    """64 bits to 64 well-mixed bits: the finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


@lru_cache(maxsize=8)
def _round_keys(seed: int | str, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * number : 8 * number + 8], "little") for number in range(ROUNDS))
