"""Strength of steering: values by row, schedules, and limits on the change of a query."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.descent.control import Schedule
from sae_query_steer.descent.goals import target_name
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.positions import TokenPositions, check_result, check_rows

Queries = Float[Tensor, "token head d_head"]


def each(values: Any, name: str) -> list[Any]:
    """Return the values of the rows, or the single value as a list.

    Raises:
        ValueError: an empty list.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        return [values]
    if not values:
        raise ValueError(f"{name} must be one value for all rows or one for each, got []")
    return list(values)


def target_labels(target: Any) -> dict[str, Any]:
    """Return what a trace is to know of the target of all rows, or of each."""
    names = tuple(target_name(one) for one in each(target, "target"))
    return {"target": names[0]} if len(set(names)) == 1 else {"row_targets": names}


def by_row(name: str, values: Any, tokens: TokenPositions) -> list[Any]:
    """Return the value of each token's row, from one for all rows or one for each.

    Raises:
        ValueError: the number of values is not that of the rows.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        return [values] * len(tokens.row)
    check_rows(name, len(values), tokens.n_rows)
    return [values[row] for row in tokens.row.tolist()]


def scheduled(schedule: Schedule, age: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Return the factors of a schedule for tokens of some ages.

    Raises:
        ValueError: the schedule does not return one finite factor, 0 or more, for each token.
    """
    factors = check_result(
        schedule(age), age.shape, f"what the schedule {scope_name(schedule)} returns"
    )
    if not bool((factors.isfinite() & (factors >= 0)).all()):
        raise ValueError(
            f"the factors of the schedule {scope_name(schedule)} must be finite and 0 or more, got "
            f"{factors.min():g} to {factors.max():g}; to steer away from a class, use a negative "
            "target weight"
        )
    return factors


def limited(
    queries: Queries, delta: Queries, *, max_relative_change: float | None, keep_norm: bool = False
) -> Queries:
    """Return a change of queries within limits; where `delta` is zero, exactly zero.

    Args:
        queries: the queries before the change.
        delta: what is to be added.
        max_relative_change: r, the largest ||delta|| / ||query||; longer changes are shortened.
        keep_norm: rotate the query towards query + delta and keep its norm. With r given, the
            angle is at most 2 asin(r / 2), so that the change keeps to r.

    Source: our choice.
    """
    if keep_norm:
        turned = _turned(queries, delta, max_relative_change)
        return torch.where((delta == 0).all(-1, keepdim=True), delta, turned)
    if max_relative_change is None:
        return delta
    size = delta.norm(dim=-1, keepdim=True)
    most = max_relative_change * queries.norm(dim=-1, keepdim=True)
    # Divided by 1 where nothing is shortened: a zero would make gradients NaN.
    shorter = delta * (most / torch.where(size > most, size, 1.0))
    return torch.where(size > most, shorter, delta)


def _turned(queries: Tensor, delta: Tensor, most: float | None) -> Tensor:
    norm = queries.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(queries.dtype).tiny
    here = queries / norm.clamp(min=tiny)
    goal = queries + delta
    across = goal - (goal * here).sum(-1, keepdim=True) * here
    side = across / across.norm(dim=-1, keepdim=True).clamp(min=tiny)
    # Orthogonalised twice: if delta is parallel to the query, `across` is only rounding error.
    side = side - (side * here).sum(-1, keepdim=True) * here
    side = side / side.norm(dim=-1, keepdim=True).clamp(min=tiny)
    angle = torch.atan2(across.norm(dim=-1, keepdim=True), (goal * here).sum(-1, keepdim=True))
    if most is not None and most < 2:
        angle = angle.clamp(max=2 * math.asin(most / 2))
    return norm * ((angle.cos() - 1) * here + angle.sin() * side)
