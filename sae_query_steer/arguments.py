"""Checks of what a user gives, and lists of problems."""

import math
import operator
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
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
    """Return problems as one message, a line each; remedies, after "; ", once at the end."""
    if len(problems) == 1:
        return problems[0]
    parts = [problem.partition("; ") for problem in problems[:most]]
    more = len(problems) - most
    lines = [what for what, _, _ in parts] + ([f"and {more} more"] if more > 0 else [])
    return "\n".join([*lines, *dict.fromkeys(remedy for *_, remedy in parts if remedy)])


def check_kind(name: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """Raise TypeError unless a value is of a type; the message has both types and the remedy."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}: {remedy}")


def check_model(model: object) -> None:
    """Raise TypeError unless a value is a model of TransformerLens."""
    if not hasattr(model, "cfg") or not hasattr(model, "tokenizer"):
        raise TypeError(
            "model must be a HookedTransformer or a TransformerBridge, such as load_model returns, "
            f"got {type(model).__name__}"
        )


def check_device(device: object) -> None:
    """Raise ValueError if a device is none of torch's, or is not on this machine."""
    import torch

    try:
        torch.empty(0, device=device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: without CUDA
        here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"device must be one of {here} on this machine, got {device!r}") from error


def check_texts(name: str, texts: object) -> None:
    """Raise TypeError if a value is one text, or no sequence, where a list of texts is wanted."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} must be a list of texts, such as ['...'], got {texts!r:.80}")


def whole_numbers(name: str, values: Any) -> list[int]:
    """Return whole numbers as a list.

    Raises:
        TypeError: not a list of whole numbers, such as "1-3" or 2.
    """
    try:
        if isinstance(values, str):
            raise TypeError
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise TypeError(
            f"{name} must be a list of whole numbers, such as [1, 2], got {values!r}"
        ) from error


def check_name(what: str, name: object, known: Iterable[object], *, place: str = "") -> None:
    """Raise ValueError unless a name is among those there are; the message lists them.

    Args:
        what: what the names are of, such as "class" or "column".
        name: the name.
        known: those there are.
        place: where, for the message.
    """
    names = [str(one) for one in known]
    if name not in names:
        near = {one.strip().casefold(): one for one in names}
        like = get_close_matches(str(name).strip().casefold(), near, n=1)
        hint = f"; did you mean {near[like[0]]!r}?" if like else ""
        plural = f"{what}{'es' if what.endswith('s') else 's'}"
        raise ValueError(f"{place}no {what} {str(name)!r}: the {plural} are {names}{hint}")
