"""The faster ways of a descent, each exact; `descent` says which there are, and why."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_query_steer.goals import Goal, Latents
from sae_query_steer.objectives import (
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
    n_steps: Int[Tensor, "..."],
    step_size: Float[Tensor, "..."],
    *,
    lower: float | None,
    movable: Bool[Tensor, "..."] | None,
) -> Latents | None:
    """Return where a descent ends, or None where only the plain loop knows.

    Args:
        z: where to start.
        goal: the centroids and how much each class is wanted.
        objective: what is minimised.
        n_steps: number of steps, a scalar or [*batch 1 1].
        step_size: step size, a scalar or [*batch 1 1].
        lower: least value of a latent; None if there is none.
        movable: latents that may move, [*batch head d_latent] or less; None means all.
    """
    given = (z, goal, n_steps, step_size)
    kind = type(objective)  # exactly these: a class derived from them may have another gradient
    if kind is SquaredDistance:
        end = _squared_distance(*given, lower=lower)
    elif kind in (CentroidContrast, LinearProbe):
        end = _constant(z, n_steps * step_size, objective.gradient(z, goal), lower=lower)
    elif isinstance(objective, PrototypeLogLikelihood) and kind is PrototypeLogLikelihood:
        end = _prototype(*given, objective.temperature, lower=lower, movable=movable)
    else:
        return None
    return end if end is None or movable is None else torch.where(movable, end, z)


def _squared_distance(
    z: Tensor, goal: Goal, n_steps: Tensor, step_size: Tensor, *, lower: float | None
) -> Tensor | None:
    shrink = step_size * goal.total
    if not bool((goal.total > 0).all()):
        return None
    point = goal.pull / goal.total
    if lower is not None:
        inside = (shrink <= 1).all() & (z >= lower).all() & (point >= lower).all()
        if not bool(inside):
            return None
    left = (1 - shrink) ** n_steps
    # Where nothing is left to do, the start itself, not the start up to rounding.
    return torch.where(left == 1, z, point + left * (z - point))


def _constant(z: Tensor, way: Tensor, gradient: Tensor, *, lower: float | None) -> Tensor | None:
    if lower is None:
        return z - way * gradient
    if not bool((z >= lower).all()):
        return None  # the first step would lift some of it, and a later one lower it again
    return (z - way * gradient).clamp(min=lower)


def _prototype(
    z: Tensor,
    goal: Goal,
    n_steps: Tensor,
    step_size: Tensor,
    temperature: float,
    *,
    lower: float | None,
    movable: Tensor | None,
) -> Tensor | None:
    """Descend in place, few operations a step, each over all rows of a head at once."""
    if z.requires_grad and torch.is_grad_enabled():
        return None  # what is written in place has no gradient
    if lower is not None and not bool((z >= lower).all()):
        return None  # a row that takes no step would be lifted all the same
    n_heads, d_latent = z.shape[-2:]
    latents = z.reshape(-1, n_heads, d_latent).transpose(0, 1)  # [head row d_latent]
    latents = latents.clone(memory_format=torch.contiguous_format)  # it is written to
    n_rows = latents.shape[1]
    centroids, norms = goal.by_head, goal.half_squares
    across = centroids.mT
    if temperature != 1:
        norms, across = norms / temperature, across / temperature
    wanted, total = _rows(goal.weights, n_rows), _rows(goal.total[..., 0], n_rows)
    rate, steps = _rows(step_size, n_rows) / temperature, _rows(n_steps, n_rows)
    same = steps.numel() == 1 or bool((steps == steps.max()).all())

    def way(scores: Tensor, step: int) -> Tensor:
        """Return how much of each centroid a step takes away, [head row class]."""
        error = scores.softmax(-1)
        if not goal.sums_to_one:
            error.mul_(total)
        error.sub_(wanted).mul_(rate)
        return error if same else error.mul_(steps > step)

    scores = torch.baddbmm(norms, latents, across, beta=-1)
    if lower is None and movable is None:
        # The latents stay in the span of the centroids: only the scores need to move.
        products, moved = centroids @ across, torch.zeros_like(scores)
        for step in range(_most(n_steps)):
            taken = way(scores, step)
            moved += taken
            scores.baddbmm_(taken, products, alpha=-1)
        latents.baddbmm_(moved, centroids, alpha=-1)
        return latents.transpose(0, 1).reshape(z.shape)
    still, start = None, latents
    if movable is not None:
        movable = movable.expand(z.shape).reshape(-1, n_heads, d_latent)
        still, start = ~movable.transpose(0, 1), latents.clone()
    for step in range(_most(n_steps)):
        latents.baddbmm_(way(scores, step), centroids, alpha=-1)
        if lower is not None:
            latents.clamp_(min=lower)
        if still is not None:
            torch.where(still, start, latents, out=latents)
        torch.baddbmm(norms, latents, across, beta=-1, out=scores)
    return latents.transpose(0, 1).reshape(z.shape)


def _rows(value: Tensor, n_rows: int) -> Tensor:
    """Return a value of all rows, or one for each row, as [1, 1 or row, 1 or class]."""
    if value.ndim == 0:
        return value.reshape(1, 1, 1)
    flat = value.reshape(-1, value.shape[-1])
    assert len(flat) in (1, n_rows)
    return flat[None]


def _most(n_steps: Tensor) -> int:
    return int(n_steps.max()) if n_steps.numel() else 0
