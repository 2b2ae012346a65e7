"""Checks of numbers that a user gives, and lists of problems."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    whole: bool = False,
    least: int | float | None = None,
    above: int | float | None = None,
    most: int | float | None = None,
) -> None:
    """Raise unless a value is a finite number, or a whole number, within its range.

    Raises:
        TypeError: it is not a number, or not a whole one; True and False are no numbers.
        ValueError: it is out of range; the message has the name, the range and the value.
    """
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if is_number and math.isfinite(number := float(value)):
        large = (least is None or number >= least) and (above is None or number > above)
        if large and (most is None or number <= most):
            return
    limits = ((">=", least), (">", above), ("<=", most))
    range_ = " and ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)
    kind = "a whole number" if whole else "a finite number"
    text = f"{name} must be {kind} {range_}".rstrip() + f", got {value!r}"
    raise ValueError(text) if is_number else TypeError(text)


def listed(problems: Sequence[str], most: int = 10) -> str:
    """Return problems as one message: the first of them in full, a line each, and the number."""
    more = len(problems) - most
    return "\n".join(problems[:most]) + (f"\nand {more} more" if more > 0 else "")
