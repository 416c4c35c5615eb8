"""What a user gives to Hydra, `key=value` on a command line and values in files: checked before anything repeats it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from opt_parallel.errors import UserError
from opt_parallel.secrets import refuse_secret_name, refuse_secret_value

KEY = re.compile(r"[\w./-]+(@[\w.:/-]*)?")
LARGEST = 2**63  # of whole numbers, as tensors hold them


def checked(arguments: Sequence[str], texts: Collection[str]) -> list[str]:
    """The command line as Hydra is to read it: overrides of the keys `texts` are in quotes where its grammar would
    read none, or another value than was typed (1e3, true).

    Raises: UserError for a secret, and for a number that no key takes."""
    parser = OverridesParser.create()
    several = bool({"-m", "--multirun"} & set(arguments))
    return [_checked(parser, argument, texts, several) for argument in arguments]


def _checked(parser: OverridesParser, argument: str, texts: Collection[str], several: bool) -> str:
    head, equals, value = argument.partition("=")
    key = head.lstrip("+~-")
    if not equals or not KEY.fullmatch(key):
        refuse_secret_name(key)
        refuse_secret_value("the command line", argument)
        return argument
    if key not in texts:  # of ours launch.secret alone looks like one, and is a name
        refuse_secret_name(key)
    refuse_secret_value(key, value)
    override: Override | None = None
    try:
        override = parser.parse_override(argument)
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise UserError(f"{key} is a number of {len(value):,} characters: give one below 2⁶³") from error
    except HydraException:
        pass
    else:
        check_values(_values(override), key)
    return f"{head}={_in_quotes(value)}" if key in texts and _misread(override, value, several) else argument


def _values(override: Override) -> Any:
    value = override.value()
    return value.list if isinstance(value, ChoiceSweep) else value


def _misread(override: Override | None, value: str, several: bool) -> bool:
    """Whether Hydra reads something else than the text that was typed."""
    if override is None:  # a list with a mistake in it is for Hydra to explain, and so is what may be a sweep
        return not (re.fullmatch(r"\s*[\[{].*[\]}]\s*", value, re.DOTALL) or (several and "," in value))
    return isinstance(override.value(), (bool, int, float))


def _in_quotes(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


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
    elif isinstance(value, (str, QuotedString)):
        refuse_secret_value(key, value if isinstance(value, str) else value.text)
