"""Sizes in bytes, as a user types them."""

from __future__ import annotations

import re
from fractions import Fraction

from opt_parallel.runtime.errors import UserError

PREFIXES = ("", "K", "M", "G", "T", "P")


def bytes_of(size: str | int, key: str) -> int:
    """Bytes of a size as Hugging Face's libraries take it: `5GB` (10⁹), `5GiB` (2³⁰), `500mb`, or a plain number.

    Capitals do not matter: `b` is a byte, not a bit. `key` is what the user set it by. Raises: UserError."""
    number, prefix, binary = _parts(size, key)
    return int(Fraction(number) * (1024 if binary else 1000) ** PREFIXES.index(prefix))


def quantity_of(size: str, key: str) -> str:
    """The same size as Kubernetes writes it: `5Gi`, `500M`, `512k`. Raises: UserError."""
    number, prefix, binary = _parts(size, key)
    return number + (f"{prefix}i" if binary else prefix.replace("K", "k"))


def _parts(size: str | int, key: str) -> tuple[str, str, bool]:
    """The number, the unit's prefix, and whether it counts by 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])(I?)B?|B)?", str(size).strip().upper(), re.ASCII)
    if match is None or Fraction(match[1]) * (1000 if match[2] else 1) < 1:
        raise UserError(f"{key}{size} is not a size: write a number and KB, MB, GB or TB, such as 5GB, or KiB … TiB")
    return match[1], match[2] or "", bool(match[3])
