"""Convert sizes that users type, such as 5GB, to bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from opt_parallel.runtime.errors import UserError

PREFIXES = ("", "K", "M", "G", "T", "P")


def bytes_of(size: str | int, key: str) -> int:
    """The number of bytes of a size in Hugging Face's notation, such as `5GB` (5 · 10⁹), `5GiB` (5 · 2³⁰), `500mb`, or
    a plain number.

    Case does not matter, so `b` is a byte and not a bit. `key` is the key or option that set the size. Raises:
    UserError."""
    number, prefix, binary = _parts(size, key)
    return int(Fraction(number) * (1024 if binary else 1000) ** PREFIXES.index(prefix))


def quantity_of(size: str, key: str) -> str:
    """The size in Kubernetes' notation, such as `5Gi`, `500M` or `512k`. Raises: UserError."""
    number, prefix, binary = _parts(size, key)
    return number + (f"{prefix}i" if binary else prefix.replace("K", "k"))


def _parts(size: str | int, key: str) -> tuple[str, str, bool]:
    """The number, the unit's prefix, and whether the unit is a power of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])(I?)B?|B)?", str(size).strip().upper(), re.ASCII)
    if match is None or Fraction(match[1]) * (1000 if match[2] else 1) < 1:
        raise UserError(f"{key}{size} is not a size: write a number and KB, MB, GB or TB, such as 5GB, or KiB … TiB")
    return match[1], match[2] or "", bool(match[3])
