"""How much to steer: by row, over generated tokens, and how far the query may go."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.descent.places import TokenPlaces

Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""From the age of tokens (0 in the prompt, 1 for the first generated one, ...) to the factors,
0 or more, by which their step size is multiplied."""


@dataclass(frozen=True)
class ExponentialDecay:
    """The factor 2^(-age / half_life): full at the end of the prompt, then less and less."""

    half_life: float
    """Generated tokens after which half is left, above 0."""

    def __post_init__(self) -> None:
        _check_positive("half_life", self.half_life)

    def __call__(self, age: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
        """Return the factors."""
        return torch.exp2(-age / self.half_life)


@dataclass(frozen=True)
class LinearWarmUp:
    """The factor min(1, age / n): nothing in the prompt, full from the n-th generated token on."""

    n: int
    """Generated tokens until it is full, 1 or more."""

    def __post_init__(self) -> None:
        _check_positive("n", self.n)

    def __call__(self, age: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
        """Return the factors."""
        return (age / self.n).clamp(max=1)


def scheduled(schedule: Schedule, places: TokenPlaces) -> Float[Tensor, " token"]:
    """Return the factors of a schedule at some tokens.

    Raises:
        ValueError: nobody said where the prompt ends, or the schedule gave something else than a
            finite factor of 0 or more for each token.
    """
    age = places.age()
    factors = schedule(age)
    if not isinstance(factors, Tensor) or factors.shape != age.shape:
        given = list(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
        raise ValueError(
            f"the schedule {schedule!r} gave {given} for {len(age)} tokens: it must give a tensor "
            "of one factor for each"
        )
    if not bool((factors.isfinite() & (factors >= 0)).all()):
        raise ValueError(
            f"the schedule {schedule!r} gave a factor that is negative or not finite: give 0 or "
            "more (to go the other way, give the target a negative weight)"
        )
    return factors


def by_row(name: str, values: Sequence[Any], places: TokenPlaces) -> list[Any]:
    """Return a value for each token from one for each row.

    Raises:
        ValueError: there are not as many values as rows.
    """
    if len(values) != places.n_rows:
        raise ValueError(
            f"{name} has {len(values)} entries: the forward pass has {places.n_rows} rows; give "
            "one for each prompt, in order, and all prompts in one call"
        )
    return [values[row] for row in places.row.tolist()]


def each(values: Any, name: str) -> list[Any]:
    """Return the values of the rows, or the one of all.

    Raises:
        ValueError: an empty list.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        return [values]
    if not values:
        raise ValueError(f"{name}=[] is not allowed: give one for all rows, or one for each")
    return list(values)


def limited(
    queries: Float[Tensor, "token head d_head"],
    delta: Float[Tensor, "token head d_head"],
    *,
    max_relative_change: float | None,
    keep_norm: bool,
) -> Float[Tensor, "token head d_head"]:
    """Return a change of queries that keeps within limits.

    Args:
        queries: the queries before.
        delta: what is to be added.
        max_relative_change: r, the largest ||delta|| / ||query||; a longer change is shortened.
        keep_norm: turn the query towards query + delta and leave its norm as it was; it is turned
            at most so far that the change keeps to r, 2 asin(r / 2).

    Returns:
        The change; where `delta` is zero, exactly zero.

    Source: our choice.
    """
    if keep_norm:
        turned = _turned(queries, delta, max_relative_change)
        return torch.where((delta == 0).all(-1, keepdim=True), delta, turned)
    if max_relative_change is None:
        return delta
    size, most = delta.norm(dim=-1, keepdim=True), queries.norm(dim=-1, keepdim=True)
    most = max_relative_change * most
    return torch.where(size > most, delta * (most / size), delta)


def check_limits(**limits: float | None) -> None:
    """Raise unless every limit that is given is a finite number above 0.

    Raises:
        ValueError: the message names it.
    """
    for name, value in limits.items():
        if value is not None:
            _check_positive(name, value)


def _turned(queries: Tensor, delta: Tensor, most: float | None) -> Tensor:
    norm = queries.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(queries.dtype).tiny
    here = queries / norm.clamp(min=tiny)
    goal = queries + delta
    across = goal - (goal * here).sum(-1, keepdim=True) * here
    side = across / across.norm(dim=-1, keepdim=True).clamp(min=tiny)
    # Once more: of a change straight back only rounding is left across, in any direction.
    side = side - (side * here).sum(-1, keepdim=True) * here
    side = side / side.norm(dim=-1, keepdim=True).clamp(min=tiny)
    angle = torch.atan2(across.norm(dim=-1, keepdim=True), (goal * here).sum(-1, keepdim=True))
    if most is not None and most < 2:
        angle = angle.clamp(max=2 * math.asin(most / 2))
    return norm * ((angle.cos() - 1) * here + angle.sin() * side)


def _check_positive(name: str, value: float | int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not allowed: give a finite number above 0")
    if value <= 0:
        raise ValueError(f"{name}={value} is not allowed: give a finite number above 0")
