"""Spans (where centroids are taken) and scopes (where to steer): one vocabulary of positions.

Positions are absolute and unpadded: the first real token of a row is 0 whatever padding stands
before it, and a decode step with a KV cache sees the position that the token really has. So a
scope means the same with the cache on and off, in a batch and row by row.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Positions:
    """Where each column of a forward pass stands in its own row."""

    index: Int[Tensor, "batch pos"]
    """Absolute position of each column, counted without padding; 0 is the row's first token."""

    valid: Bool[Tensor, "batch pos"]
    """False where the column is padding."""

    prompt_lengths: Int[Tensor, " batch"] | None = None
    """Tokens of the prompt in each row (BOS included); None where nobody said so."""

    lengths: Int[Tensor, " batch"] | None = None
    """Tokens of the whole row; None while the row is still being generated."""


Scope: TypeAlias = Callable[[Positions], Tensor]
"""Any function from `Positions` to a boolean tensor [batch pos]; the classes here are such."""

Span: TypeAlias = Scope
"""A scope used to say where centroids are taken."""


_NO_LAST_TOKEN = (
    "LastResponseToken() can't be a scope: while a row is generated nobody knows its last token; "
    "steer at LastPromptToken(), ResponseTokens() or EveryPosition()"
)


class _Joinable:
    """Adds `|`, so that scopes read as they are said: `LastPromptToken() | ResponseTokens()`."""

    def __or__(self, other: Scope) -> "AnyOf":
        return AnyOf(self, other)  # pyright: ignore[reportArgumentType]

    def __ror__(self, other: Scope) -> "AnyOf":
        return AnyOf(other, self)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class EveryPosition(_Joinable):
    """Every real token of the row; never padding."""

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the real columns."""
        return positions.valid


@dataclass(frozen=True)
class LastPromptToken(_Joinable):
    """The last token of the prompt: the read-out position whose query starts the response.

    As a scope it acts once per call of `generate`, on the forward pass that reads the prompt.
    """

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the column at `prompt_length - 1` of each row."""
        return positions.index == _prompt_lengths(positions, self)[:, None] - 1


@dataclass(frozen=True)
class ResponseTokens(_Joinable):
    """Every token after the prompt: the response of an example, or the generated tokens."""

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the columns at or after `prompt_length` of each row."""
        return positions.index >= _prompt_lengths(positions, self)[:, None]


@dataclass(frozen=True)
class LastResponseToken(_Joinable):
    """The last token of the response; a span only, as a running generation has no last token."""

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the column at `length - 1` of each row that has a response."""
        if positions.lengths is None:
            raise ValueError(_NO_LAST_TOKEN)
        last = positions.index == positions.lengths[:, None] - 1
        return last & ResponseTokens()(positions)


@dataclass(frozen=True, init=False)
class AnyOf(_Joinable):
    """The union of scopes: a position counts when at least one of them names it."""

    scopes: tuple[Scope, ...]
    """The scopes that are joined."""

    def __init__(self, *scopes: Scope) -> None:
        if not scopes:
            raise ValueError("AnyOf() needs at least one scope; got none")
        for scope in scopes:
            check_scope(scope, name="scope")
        object.__setattr__(self, "scopes", scopes)

    def __repr__(self) -> str:
        return scope_name(self)

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the union of the scopes' columns."""
        return reduce(operator.or_, (select(scope, positions) for scope in self.scopes))


def select(scope: Scope, positions: Positions) -> Bool[Tensor, "batch pos"]:
    """Return the real columns that a scope names.

    Args:
        scope: a scope of this module, or a user's function of the same form.
        positions: where the columns of this forward pass stand.

    Returns:
        A mask over [batch pos] in which padding is always False.

    Raises:
        TypeError: the scope returned something other than a boolean tensor.
        ValueError: its shape is not [batch pos], or it needs prompt lengths that nobody gave.

    Source: our choice.
    """
    mask = scope(positions)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"the scope {scope!r} returned {_describe(mask)}: it must return a boolean tensor "
            "of shape [batch pos]"
        )
    if mask.shape != positions.valid.shape:
        raise ValueError(
            f"the scope {scope!r} returned shape {list(mask.shape)}: this forward pass has "
            f"[batch pos] = {list(positions.valid.shape)}"
        )
    return mask & positions.valid


def scope_name(scope: Scope) -> str:
    """Return how a scope prints; a function by its name, without the address that changes."""
    if isinstance(scope, AnyOf):
        return " | ".join(map(scope_name, scope.scopes))
    name = getattr(scope, "__qualname__", None)
    return repr(scope) if name is None else f"{scope.__module__}.{name}"


def check_scope(scope: object, *, name: str, generating: bool = False) -> None:
    """Raise unless a value can be called as a scope; `name` is the argument it came by.

    Args:
        scope: the value.
        name: what the message calls it.
        generating: it is to hold while rows are generated, so their end is not known.

    Raises:
        TypeError: the value is not callable, or is a class where an instance is meant.
        ValueError: `LastResponseToken` where rows are generated.
    """
    if generating and isinstance(scope, LastResponseToken):
        raise ValueError(_NO_LAST_TOKEN)
    if generating and isinstance(scope, AnyOf):
        for part in scope.scopes:
            check_scope(part, name=name, generating=True)
    allowed = "LastPromptToken(), ResponseTokens(), EveryPosition(), a union with |, or a function"
    if isinstance(scope, type):
        raise TypeError(f"{name}={scope.__name__} is a class: write {name}={scope.__name__}()")
    if not callable(scope):
        raise TypeError(f"{name}={scope!r} is no scope; allowed: {allowed} of Positions")


def _prompt_lengths(positions: Positions, scope: object) -> Int[Tensor, " batch"]:
    if positions.prompt_lengths is None:
        raise ValueError(
            f"{scope!r} must know where the prompt ends, and this forward pass did not come from "
            "generate() or generate_stream(): pass prompt_lengths=[...] (tokens of each row's "
            "prompt, BOS included), or use EveryPosition()"
        )
    return positions.prompt_lengths


def _describe(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"{type(value).__name__}"
