"""Spans (where centroids are taken) and scopes (where to steer): one vocabulary of positions.

Positions are absolute and unpadded: the first real token of a row is 0 whatever padding stands
before it, and a decode step with a KV cache sees the position that the token really has. So a
scope means the same with the cache on and off, in a batch and row by row. Here are what scopes
are, how they are joined, and the four that everything else needs; the others are in `scopes`.
"""

import operator
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_query_steer.scopes.columns import Positions, Scope, known_prompt_lengths, select
from sae_query_steer.scopes.contradictions import Cuts, all_cases

Span: TypeAlias = Scope
"""A scope used to say where centroids are taken."""


_NO_LAST_TOKEN = (
    "LastResponseToken() can't be a scope: while a row is generated nobody knows its last token; "
    "steer at LastPromptToken(), ResponseTokens() or EveryPosition()"
)


class Joinable:
    """Adds `|`, `&` and `~`, so that scopes read as they are said."""

    needs_tokens: ClassVar[bool] = False
    """Whether the scope reads `Positions.tokens`."""

    def _cuts(self) -> Cuts | None:
        """Return where the scope may change; None where that can't be known beforehand."""
        return None

    def __or__(self, other: Scope) -> "AnyOf":
        return AnyOf(self, other)  # pyright: ignore[reportArgumentType]

    def __ror__(self, other: Scope) -> "AnyOf":
        return AnyOf(other, self)  # pyright: ignore[reportArgumentType]

    def __and__(self, other: Scope) -> "AllOf":
        return AllOf(self, other)  # pyright: ignore[reportArgumentType]

    def __rand__(self, other: Scope) -> "AllOf":
        return AllOf(other, self)  # pyright: ignore[reportArgumentType]

    def __invert__(self) -> "Not":
        return Not(self)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class EveryPosition(Joinable):
    """Every real token of the row; never padding."""

    def _cuts(self) -> Cuts:
        return Cuts()

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the real columns."""
        return positions.valid


@dataclass(frozen=True)
class LastPromptToken(Joinable):
    """The last token of the prompt: the read-out position whose query starts the response.

    As a scope it acts once per call of `generate`, on the forward pass that reads the prompt.
    """

    def _cuts(self) -> Cuts:
        return Cuts(from_prompt_end=frozenset({-1, 0}))

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the column at `prompt_length - 1` of each row."""
        return positions.index == known_prompt_lengths(positions, self)[:, None] - 1


@dataclass(frozen=True)
class ResponseTokens(Joinable):
    """Every token after the prompt: the response of an example, or the generated tokens."""

    def _cuts(self) -> Cuts:
        return Cuts(from_prompt_end=frozenset({0}))

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the columns at or after `prompt_length` of each row."""
        return positions.index >= known_prompt_lengths(positions, self)[:, None]


@dataclass(frozen=True)
class LastResponseToken(Joinable):
    """The last token of the response; a span only, as a running generation has no last token."""

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the column at `length - 1` of each row that has a response."""
        if positions.lengths is None:
            raise ValueError(_NO_LAST_TOKEN)
        last = positions.index == positions.lengths[:, None] - 1
        return last & ResponseTokens()(positions)


@dataclass(frozen=True, init=False)
class _Join(Joinable):
    scopes: tuple[Scope, ...]
    """The scopes that are joined."""

    def __init__(self, *scopes: Scope) -> None:
        if not scopes:
            raise ValueError(f"{type(self).__name__}() needs at least one scope; got none")
        for scope in scopes:
            check_scope(scope, name="scope")
        object.__setattr__(self, "scopes", scopes)
        _check_possible(self)

    def __repr__(self) -> str:
        return scope_name(self)

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the union or the intersection of the scopes' columns."""
        return self._of([select(scope, positions) for scope in self.scopes])

    def _of(self, masks: list[Tensor]) -> Tensor:
        return reduce(operator.and_ if isinstance(self, AllOf) else operator.or_, masks)


@dataclass(frozen=True, init=False, repr=False)
class AnyOf(_Join):
    """The union of scopes: a position counts when at least one of them names it."""


@dataclass(frozen=True, init=False, repr=False)
class AllOf(_Join):
    """The intersection of scopes: a position counts when every one of them names it."""


@dataclass(frozen=True, repr=False)
class Not(Joinable):
    """The complement of a scope: every real token that it does not name; never padding."""

    scope: Scope
    """What is left out."""

    def __post_init__(self) -> None:
        check_scope(self.scope, name="scope")
        _check_possible(self)

    def __repr__(self) -> str:
        return scope_name(self)

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the real columns outside the scope."""
        return positions.valid & ~select(self.scope, positions)


def scope_name(scope: Scope) -> str:
    """Return how a scope prints; a function by its name, without the address that changes."""
    match scope:
        case AnyOf():
            return " | ".join(map(scope_name, scope.scopes))
        case AllOf():
            return " & ".join(_in_brackets(part, AnyOf) for part in scope.scopes)
        case Not():
            return "~" + _in_brackets(scope.scope, AnyOf, AllOf)
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
    if generating and isinstance(scope, LastResponseToken):
        raise ValueError(_NO_LAST_TOKEN)
    for part in _parts(scope):
        check_scope(part, name=name, generating=generating)
    if isinstance(scope, type):
        raise TypeError(f"{name}={scope.__name__} is a class: write {name}={scope.__name__}()")
    if not callable(scope):
        raise TypeError(
            f"{name}={scope!r} is no scope; allowed: LastPromptToken(), ResponseTokens(), "
            "EveryPosition() and the like, joined with |, & and ~, or a function of Positions"
        )


def _parts(scope: object) -> tuple[Scope, ...]:
    if isinstance(scope, _Join):
        return scope.scopes
    return (scope.scope,) if isinstance(scope, Not) else ()


def _check_possible(scope: Scope) -> None:
    cases = torch.tensor(all_cases(_all_cuts(scope)))
    index = cases[:, :1]
    positions = Positions(
        index=index, valid=torch.ones_like(index, dtype=torch.bool), prompt_lengths=cases[:, 1]
    )
    if not bool(_judged(scope, positions, in_doubt=True).any()):
        raise ValueError(
            f"{scope_name(scope)} can never hold: no position of any row is in it; to steer in one "
            "scope or the other, join them with |"
        )


def _all_cuts(scope: Scope) -> Cuts:
    if parts := _parts(scope):
        return reduce(operator.or_, map(_all_cuts, parts))
    return (scope._cuts() if isinstance(scope, Joinable) else None) or Cuts()


def _judged(scope: Scope, positions: Positions, *, in_doubt: bool) -> Tensor:
    """Return where a scope holds, and `in_doubt` where that can't be known beforehand."""
    match scope:
        case _Join():
            return scope._of([_judged(s, positions, in_doubt=in_doubt) for s in scope.scopes])
        case Not():
            return ~_judged(scope.scope, positions, in_doubt=not in_doubt)
        case Joinable() if scope._cuts() is not None:
            return scope(positions)
    return torch.full_like(positions.valid, in_doubt)


def _in_brackets(scope: Scope, *loose: type) -> str:
    name = scope_name(scope)
    return f"({name})" if isinstance(scope, loose) else name
