"""Values that a user gave, in whatever form: checked before anything repeats them."""

from __future__ import annotations

import math
from typing import Any

from opt_parallel.config.secrets import refuse_secret_name, refuse_secret_value
from opt_parallel.runtime.errors import UserError

LARGEST = 2**63  # of whole numbers, as tensors hold them


def check_values(value: Any, key: str = "") -> None:
    """Check all that a value holds, at any depth; `key` is where it stands.

    Raises: UserError, which names the key, for a secret, and for a number that is not finite or has no 64 bits."""
    if isinstance(value, dict):
        for name, inner in value.items():
            whole = f"{key}.{name}" if key else str(name)
            refuse_secret_name(whole)
            check_values(inner, whole)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_values(inner, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} must be a finite number")
    elif isinstance(value, int) and abs(value) >= LARGEST:
        raise UserError(f"{key} is a number of {value.bit_length():,} bits: give one below 2⁶³")
    elif isinstance(value, str):
        refuse_secret_value(key, value)


def flat(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level: `section.key`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
