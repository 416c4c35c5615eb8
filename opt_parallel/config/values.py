"""Check values from users before they are printed or written to files."""

from __future__ import annotations

import math
from typing import Any

from opt_parallel.config.secrets import refuse_secret_name, refuse_secret_value
from opt_parallel.runtime.errors import UserError

LARGEST = 2**63  # integers must be smaller, since a tensor's element holds 64 bits


def check_values(value: Any, key: str = "") -> None:
    """Check a value and all values nested in it. `key` is the dotted key of the value.

    Raises: UserError with the key, for a secret, a number that is not finite, or an integer of more than 64 bits."""
    if isinstance(value, dict):
        for name, inner in value.items():
            full_key = f"{key}.{name}" if key else str(name)
            refuse_secret_name(full_key)
            check_values(inner, full_key)
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
    """A nested dictionary as one level with dotted keys, such as `section.key`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
