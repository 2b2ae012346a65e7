"""Joins of scopes with `|`, `&` and `~`, and checks of scopes."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

from jaxtyping import Bool
from torch import Tensor

from sae_query_steer.scopes.positions import Positions, Scope, select


class Joinable:
    """Adds `|`, `&` and `~`."""

    needs_tokens: ClassVar[bool] = False
    """Whether the scope reads `Positions.tokens`."""

    span_only: ClassVar[str | None] = None
    """Why it can't be a scope, if it can't be one while rows are generated."""

    def __or__(self, other: Scope) -> "AnyOf":
        return AnyOf(self, other)

    def __and__(self, other: Scope) -> "AllOf":
        return AllOf(self, other)

    def __invert__(self) -> "Not":
        return Not(self)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, init=False, repr=False)
class _Join(Joinable):
    scopes: tuple[Scope, ...]
    """The scopes that are joined."""

    _sign: ClassVar[str]
    _operation: ClassVar[Callable[[Any, Any], Any]]

    def __init__(self, *scopes: Any) -> None:
        if not scopes:
            raise ValueError(f"{type(self).__name__} must have at least one scope, got none")
        for scope in scopes:
            check_scope(scope, name="scope")
        object.__setattr__(self, "scopes", scopes)

    def __repr__(self) -> str:
        looser = (AnyOf,) if isinstance(self, AllOf) else ()
        return self._sign.join(_in_brackets(scope, looser) for scope in self.scopes)

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the union or the intersection of the scopes' columns."""
        return reduce(self._operation, [select(scope, positions) for scope in self.scopes])


@dataclass(frozen=True, init=False, repr=False)
class AnyOf(_Join):
    """The union of scopes: a position counts when at least one of them names it."""

    _sign, _operation = " | ", operator.or_


@dataclass(frozen=True, init=False, repr=False)
class AllOf(_Join):
    """The intersection of scopes: a position counts when every one of them names it."""

    _sign, _operation = " & ", operator.and_


@dataclass(frozen=True, repr=False)
class Not(Joinable):
    """The complement of a scope: every real token that it does not name; never padding."""

    scope: Scope
    """What is left out."""

    def __post_init__(self) -> None:
        check_scope(self.scope, name="scope")

    def __repr__(self) -> str:
        return "~" + _in_brackets(self.scope, (AnyOf, AllOf))

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the real columns outside the scope."""
        return positions.valid & ~select(self.scope, positions)


def scope_name(scope: Callable[..., Any]) -> str:
    """Return how a scope, schedule or gate prints; a function by its name, not its address."""
    name = getattr(scope, "__qualname__", None)
    return repr(scope) if name is None else f"{scope.__module__}.{name}"


def needs_tokens(scope: Scope) -> bool:
    """Return whether a scope may read `Positions.tokens`.

    A user's function may, unless it has an attribute `needs_tokens` that says otherwise.
    """
    parts = _parts(scope)
    return any(map(needs_tokens, parts)) if parts else bool(getattr(scope, "needs_tokens", True))


def check_scope(scope: object, *, name: str, generating: bool = False) -> None:
    """Raise unless a value can be called as a scope; `name` is the argument it came by.

    Args:
        scope: the value.
        name: what the message calls it.
        generating: it is to hold while rows are generated, so their end is not known.

    Raises:
        TypeError: the value is not callable, or is a class where an instance is meant.
        ValueError: `LastResponseToken` where rows are generated, in a join too.
    """
    if isinstance(scope, type) or not callable(scope):
        raise TypeError(
            f"{name} must be a scope, such as LastPromptToken() or ResponseTokens(), or a function "
            f"of Positions, got {scope!r}"
        )
    if generating and (reason := getattr(scope, "span_only", None)):
        raise ValueError(reason)
    for part in _parts(scope):
        check_scope(part, name=name, generating=generating)


def _parts(scope: object) -> tuple[Scope, ...]:
    if isinstance(scope, Not):
        return (scope.scope,)
    return scope.scopes if isinstance(scope, _Join) else ()


def _in_brackets(scope: Scope, looser: tuple[type, ...]) -> str:
    name = scope_name(scope)
    return f"({name})" if isinstance(scope, looser) else name
