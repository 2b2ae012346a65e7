"""Exact methods that are faster than the plain loop; `loop` lists them."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.descent.control import Bounds
from sae_query_steer.descent.goals import Goal, Latents
from sae_query_steer.descent.objectives import (
    CentroidContrast,
    LinearProbe,
    Objective,
    PrototypeLogLikelihood,
    SquaredDistance,
)


def fast_descent(
    z: Latents,
    goal: Goal,
    objective: Objective,
    n_steps: int | Int[Tensor, "..."],
    step_size: float | Float[Tensor, "..."],
    bounds: Bounds,
) -> Latents | None:
    """Return the end of a descent, or None if only the plain loop applies.

    Args as `descend`, with per-row values as [*batch 1 1].
    """
    lower, movable = bounds.lower, bounds.movable
    if bounds.radius is not None or bounds.until is not None:
        return None
    if lower is not None and z.numel() and float(z.detach().min()) < lower:
        return None  # the first step would raise a latent that a later one can lower again
    kind = type(objective)  # exactly: a subclass may have another gradient
    if kind is SquaredDistance:
        end = _squared_distance(z, goal, n_steps, step_size, lower)
    elif kind in (CentroidContrast, LinearProbe):
        end = z - n_steps * step_size * objective.gradient(z, goal)
        end = end if lower is None else end.clamp(min=lower)
    elif isinstance(objective, PrototypeLogLikelihood) and kind is PrototypeLogLikelihood:
        end = _prototype(z, goal, n_steps, step_size, objective.temperature, bounds)
    else:
        return None
    return end if end is None or movable is None else torch.where(movable, end, z)


def _squared_distance(
    z: Tensor, goal: Goal, n_steps: Any, step_size: Any, lower: float | None
) -> Tensor | None:
    total = goal.total if goal.shared_total is None else goal.shared_total
    shrink = step_size * total
    if not _everywhere(total > 0):
        return None
    if lower is not None and (goal.least_of_point < lower or not _everywhere(shrink <= 1)):
        return None
    if not isinstance(shrink, Tensor) and shrink > 2:
        # It diverges: a tensor overflows to infinity, where a Python number raises.
        shrink = torch.tensor(shrink, dtype=z.dtype, device=z.device)
    left = (1 - shrink) ** n_steps
    # Where left is 1, return the start itself, not up to rounding.
    if not isinstance(left, Tensor):
        return z if left == 1 else torch.lerp(z, goal.point, 1 - left)
    return torch.where(left == 1, z, torch.lerp(z, goal.point, (1 - left).to(z)))


def _prototype(
    z: Tensor, goal: Goal, n_steps: Any, step_size: Any, temperature: float, bounds: Bounds
) -> Tensor | None:
    """Descend in place, with few operations per step, over all rows of a head at once."""
    if z.requires_grad and torch.is_grad_enabled():
        return None  # in-place operations have no gradient
    lower, movable = bounds.lower, bounds.movable
    n_heads, d_latent = z.shape[-2:]
    latents = z.reshape(-1, n_heads, d_latent).transpose(0, 1)  # [head row d_latent]
    latents = latents.clone(memory_format=torch.contiguous_format)
    norms, centroids = goal.half_squares, goal.by_head
    if temperature != 1:
        norms, centroids = norms / temperature, centroids / temperature
    # Rows last: the long product is fastest this way.
    scores = torch.baddbmm(norms, centroids, latents.mT, beta=-1)  # [head class row]
    basis, take = _steps(goal, n_steps, step_size, temperature, scores)
    if lower is None and movable is None:
        # The latents stay in the span of the centroids: only the scores need to move.
        products, moved = centroids @ basis.mT, torch.zeros_like(scores)
        for step in range(max_steps(n_steps)):
            taken = take(step)
            moved += taken
            scores.baddbmm_(products, taken, alpha=-1)
        latents.baddbmm_(moved.mT, basis, alpha=-1)
        return latents.transpose(0, 1).reshape(z.shape)
    still, start = None, latents
    if movable is not None:
        movable = movable.expand(z.shape).reshape(-1, n_heads, d_latent)
        still, start = ~movable.transpose(0, 1), latents.clone()
    for step in range(max_steps(n_steps)):
        latents.baddbmm_(take(step).mT, basis, alpha=-1)
        if lower is not None:
            latents.clamp_(min=lower)
        if still is not None:
            torch.where(still, start, latents, out=latents)
        torch.baddbmm(norms, centroids, latents.mT, beta=-1, out=scores)
    return latents.transpose(0, 1).reshape(z.shape)


def _steps(
    goal: Goal, n_steps: Any, step_size: Any, temperature: float, scores: Tensor
) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Return a basis [head class d_latent] and a function `take(step)`: its share [head class row].

    A step subtracts a (s sum_k p_k c_k - c_w) from the latents, a the step size over T. If all rows
    share weights, steps and sizes, that is sum_k p_k a (s c_k - c_w), because p sums to 1: a step
    then costs no more than the posterior. `take` reads the current `scores`.
    """
    taken, rate, total = torch.empty_like(scores), step_size / temperature, goal.shared_total
    if total is not None and not isinstance(rate, Tensor) and not isinstance(n_steps, Tensor):
        basis = rate * (total * goal.by_head - goal.pull[:, None])
        return basis, lambda _step: torch.softmax(scores, 1, out=taken)
    n_rows = scores.shape[-1]
    wanted, total = _rows(goal.weights, n_rows), _rows(goal.total[..., 0], n_rows)
    rate = _rows(torch.as_tensor(rate).to(scores), n_rows)
    left = _rows(torch.as_tensor(n_steps, device=scores.device), n_rows)

    def take(step: int) -> Tensor:
        torch.softmax(scores, 1, out=taken)
        return taken.mul_(total).sub_(wanted).mul_(rate * (left > step))

    return goal.by_head, take


def _rows(value: Tensor, n_rows: int) -> Tensor:
    """Return a value of all rows, or one for each row, as [1, 1 or class, 1 or row]."""
    if value.ndim == 0:
        return value.reshape(1, 1, 1)
    flat = value.reshape(-1, value.shape[-1])
    assert len(flat) in (1, n_rows)
    return flat.mT[None]


def max_steps(n_steps: int | Tensor) -> int:
    """Return the largest number of steps of any row."""
    if isinstance(n_steps, Tensor):
        return int(n_steps.max()) if n_steps.numel() else 0
    return n_steps


def _everywhere(condition: bool | Tensor) -> bool:
    return bool(condition.all()) if isinstance(condition, Tensor) else condition
