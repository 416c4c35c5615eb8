"""Check Hydra's overrides (`key=value`) before they are printed or written to files."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from opt_parallel.config.secrets import refuse_secret_name, refuse_secret_value
from opt_parallel.config.values import check_values
from opt_parallel.runtime.errors import UserError

KEY = re.compile(r"[\w./-]+(@[\w.:/-]*)?")
# The keys whose value `opt-parallel plan` chooses if it is AUTO. No other command knows this value.
PLANNED, AUTO = ("parallel.tensor", "zero.stage", "batch.micro", "activation_checkpointing"), "auto"


def checked(arguments: Sequence[str], texts: Collection[str]) -> list[str]:
    """The overrides of the command line, checked and quoted for Hydra. Values of the text keys `texts` are quoted if
    Hydra's grammar would refuse them or read them as another type (1e3, true).

    Raises: UserError for a secret, for a number that is not finite or too large, and for a value that only
    `opt-parallel plan` knows."""
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
    if key not in texts:  # launch.secret is exempt, since it holds only a secret's name
        refuse_secret_name(key)
    refuse_secret_value(key, value)
    try:
        value_read = _value(parser.parse_override(argument))
    except ValueError as error:  # Python refuses to parse numbers of more than 4,300 digits
        raise UserError(f"{key} is a number of {len(value):,} characters: give one below 2⁶³") from error
    except HydraException:  # Hydra itself handles malformed lists and possible sweeps
        is_text = not re.fullmatch(r"\s*[\[{].*[\]}]\s*", value, re.DOTALL) and not (several and "," in value)
    else:
        _refuse_auto(argument, key, value_read)
        # The value is quoted below, so that the text 1e3 does not become a number.
        is_text = isinstance(value_read, (bool, int, float))
        if not (is_text and key in texts):
            check_values(value_read, key)
    return f"{head}={_in_quotes(value)}" if is_text and key in texts else argument


def _refuse_auto(argument: str, key: str, value: Any) -> None:
    if key in PLANNED and AUTO in (value if isinstance(value, list) else [value]):
        raise UserError(
            f"{argument}: {AUTO} is a value for opt-parallel plan, which finds the fastest setting that fits: run "
            "opt-parallel plan with the same keys and cluster=…, and use the settings that it prints",
            shared=True,
        )


def _value(override: Override) -> Any:
    value = override.value()
    return value.list if isinstance(value, ChoiceSweep) else value


def _in_quotes(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()
