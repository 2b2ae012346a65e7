"""Joins of scopes with `|`, `&` and `~`, and checks of scopes.

A join that can never hold is refused. A scope such as "the prompt" or "positions 3 to 5" is
constant between a few numbers, so a handful of positions and prompt lengths stand for all.
"""

import operator
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_query_steer.scopes.positions import Positions, Scope, select


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """The numbers between which a scope does not change."""

    absolute: frozenset[int] = frozenset()
    """Positions in the row at which the scope may begin or end."""

    from_prompt_end: frozenset[int] = frozenset()
    """The same, counted from the prompt's end: 0 is the first token after it."""

    def __or__(self, other: "Cuts") -> "Cuts":
        return Cuts(
            absolute=self.absolute | other.absolute,
            from_prompt_end=self.from_prompt_end | other.from_prompt_end,
        )


def all_cases(cuts: Cuts) -> list[tuple[int, int]]:
    """Return a pair (position, prompt length) for every way in which a token can lie to the cuts.

    Between two neighbouring cuts all positions are alike, so the row falls into stretches, and so
    does the way from the prompt's end. Every pair of stretches in which some token of some row
    with a prompt of at least one token can lie is represented by one such token.

    Args:
        cuts: those of all parts of a scope.

    Returns:
        Pairs of a position, 0 or more, and a prompt length, 1 or more.

    Source: our choice.
    """
    starts = sorted({0} | {cut for cut in cuts.absolute if cut > 0})
    ends: list[int | None] = [*starts[1:], None]
    offsets = sorted(cuts.from_prompt_end)
    before_all = offsets[0] - 1 if offsets else -1
    cases = []
    for start, end in zip(starts, ends, strict=True):
        cases.append((start, start - min(before_all, start - 1)))
        for offset in offsets:
            position = max(start, offset + 1)
            if end is None or position < end:
                cases.append((position, position - offset))
    return cases


class Joinable:
    """Adds `|`, `&` and `~`."""

    needs_tokens: ClassVar[bool] = False
    """Whether the scope reads `Positions.tokens`."""

    span_only: ClassVar[str | None] = None
    """Why it can't be a scope, if it can't be one while rows are generated."""

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
    reason = getattr(scope, "span_only", None)
    if generating and reason is not None and not isinstance(scope, type):
        raise ValueError(reason)
    for part in _parts(scope):
        check_scope(part, name=name, generating=generating)
    if isinstance(scope, type):
        raise TypeError(f"{name}={scope.__name__} is a class: write {name}={scope.__name__}()")
    if not callable(scope):
        raise TypeError(
            f"{name} must be a scope, such as LastPromptToken() or ResponseTokens(), or a function "
            f"of Positions, got {scope!r}"
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
