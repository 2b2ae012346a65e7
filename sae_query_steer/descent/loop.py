"""K steps of projected gradient descent on any objective, by the fastest way that is exact.

The plain loop takes any objective. Where mathematics allows, the same end is reached at once:

- squared distance: z_K = p + (1 - s a)^K (z_0 - p), with a = sum_k w_k and the point p = c_w / a
  that the weights name, as long as no latent would leave its range: s a <= 1, z_0 and p in it;
- contrast and linear probe: the direction g is constant, so z_K = max(lower, z_0 - K s g);
- prototype without a lower bound: the whole path lies in the span of the centroids, so K steps need
  only <z, c_k> and the centroids' inner products, whatever the number of latents;
- prototype with a lower bound: the same loop, in place, with fewer operations a step.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_query_steer.descent.fast import fast_descent
from sae_query_steer.descent.goals import Goal, Latents
from sae_query_steer.descent.objectives import Objective, posterior_of_target

Steps = int | Int[Tensor, "*batch"]
StepSize = float | Float[Tensor, "*batch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DescentResult:
    """Where the descent ended, and its loss on the way."""

    z: Latents
    """The latents after the last step."""

    loss: Float[Tensor, "steps *batch head"] | None
    """Loss before the first step and after each: `n_steps + 1` rows; None unless recorded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """What a descent may do: which latents move, how far, and when it stops."""

    lower: float | None = 0.0
    """Least value a latent can take (0 for ReLU and TopK latents); None: no projection."""

    movable: Bool[Tensor, "..."] | None = None
    """Latents that may move, [*batch head d_latent] or [head d_latent]; None means all."""

    radius: float | None = None
    """Trust region: largest ||z - z_0|| of a row and head, in units of the latents."""

    until: float | None = None
    """A row and head stops once `objectives.posterior_of_target` reaches this."""

    temperature: float = 1.0
    """Of that posterior, softmax_k(-1/2 ||z - c_k||^2 / T)."""


def descend(
    z: Latents,
    goal: Goal,
    objective: Objective,
    *,
    n_steps: Steps,
    step_size: StepSize,
    bounds: Bounds | None = None,
    record_loss: bool = False,
) -> DescentResult:
    """Move latents towards a goal by projected gradient descent: z <- max(lower, z - s g(z)).

    Every row and head moves on its own. Zero steps and a step size of zero return `z` itself,
    bit for bit. The way is chosen by mathematics, never by approximation: it ends where
    `plain_descent` ends, up to rounding.

    Args:
        z: where to start, [*batch head d_latent].
        goal: the centroids and how much each class is wanted.
        objective: what is minimised.
        n_steps: number of steps, 0 or more; one for all, or one for each row.
        step_size: s, 0 or more, in units of the objective's gradient; likewise.
        bounds: what it may do; None means latents of 0 or more, and nothing else.
        record_loss: also return the loss of every step, by the plain loop.

    Returns:
        The latents at the end and, on request, the loss before and after each step.

    Raises:
        ValueError: `n_steps` or `step_size` is negative or not finite, or loss or gradient of the
            objective have other shapes than theirs.

    Source: arXiv 2502.18644 for gradient descent in the latent space; the projection onto the
    SAE's latent range, and the faster ways, are our choice.
    """
    bounds = Bounds() if bounds is None else bounds
    if isinstance(n_steps, int) and isinstance(step_size, int | float):
        check_strength(n_steps, step_size)
        if (n_steps == 0 or step_size == 0) and not record_loss:
            return DescentResult(z=z, loss=None)
    fast = None
    if bounds.radius is None and bounds.until is None:
        fast = fast_descent(
            z,
            goal,
            objective,
            _spread(n_steps, z),
            _spread(step_size, z),
            lower=bounds.lower,
            movable=bounds.movable,
        )
    if fast is not None and not record_loss:
        return DescentResult(z=fast, loss=None)
    given = {"n_steps": n_steps, "step_size": step_size, "bounds": bounds}
    slow = plain_descent(z, goal, objective, **given, record_loss=record_loss)
    if fast is None or slow.loss is None:
        return slow
    # What is recorded changes no number: where the fast way ends, it ends.
    last = _loss(objective, fast, goal)[None]
    return DescentResult(z=fast, loss=torch.cat([slow.loss[:-1], last]))


def plain_descent(
    z: Latents,
    goal: Goal,
    objective: Objective,
    *,
    n_steps: Steps,
    step_size: StepSize,
    bounds: Bounds,
    record_loss: bool = False,
) -> DescentResult:
    """Do what `descend` does, step by step: the reference for every faster way.

    Args and Returns as `descend`. In each step the latents that may move take it, then the trust
    region is kept (by shrinking the way from the start), then the lower bound; neither of the two
    undoes the other, for the start lies in both.
    """
    start, size = z, _per_row(step_size, z)
    left = _per_row(n_steps, z)
    losses = [_loss(objective, z, goal)] if record_loss else []
    for step in range(int(left.max()) if left.numel() else 0):
        gradient = objective.gradient(z, goal)
        _check_shape(gradient, z.shape, objective, "gradient")
        moves = (left > step) & (size > 0)
        if bounds.until is not None:
            posterior = posterior_of_target(z, goal, bounds.temperature)
            moves = moves & (posterior < bounds.until)[..., None]
        if bounds.movable is not None:
            moves = moves & bounds.movable
        moved = z - size * gradient
        if bounds.radius is not None:
            way = moved - start
            norm = way.norm(dim=-1, keepdim=True)
            moved = torch.where(norm > bounds.radius, start + way * (bounds.radius / norm), moved)
        if bounds.lower is not None:
            moved = moved.clamp(min=bounds.lower)
        z = torch.where(moves, moved, z)
        if record_loss:
            losses.append(_loss(objective, z, goal))
    return DescentResult(z=z, loss=torch.stack(losses) if record_loss else None)


def check_strength(n_steps: int, step_size: float) -> None:
    """Raise unless a number of steps and a step size can be used.

    Raises:
        TypeError: `n_steps` is not a whole number, or `step_size` not a number.
        ValueError: a value is negative or not finite.
    """
    if isinstance(n_steps, bool) or not isinstance(n_steps, Integral):
        raise TypeError(f"n_steps={n_steps!r} is not allowed: give a whole number, 0 or more")
    if n_steps < 0:
        raise ValueError(f"n_steps={n_steps} is not allowed: give 0 or more (0 changes nothing)")
    if isinstance(step_size, bool) or not isinstance(step_size, Real):
        raise TypeError(f"step_size={step_size!r} is not allowed: give a number, 0 or more")
    if not math.isfinite(step_size) or step_size < 0:
        raise ValueError(
            f"step_size={step_size} is not allowed: give a finite number, 0 or more "
            "(0 changes nothing)"
        )


def _spread(value: Any, z: Tensor) -> Any:
    """Return a number as it is, and a value for each row so that it spreads over latents."""
    return value.to(z.device)[..., None, None] if isinstance(value, Tensor) else value


def _per_row(value: int | float | Tensor, z: Tensor) -> Tensor:
    """Return a number as a tensor that spreads over the latents of each row."""
    if isinstance(value, Tensor):
        return _spread(value, z)
    return torch.tensor(value, device=z.device, dtype=z.dtype if isinstance(value, float) else None)


def _loss(objective: Objective, z: Latents, goal: Goal) -> Tensor:
    loss = objective.loss(z, goal)
    _check_shape(loss, z.shape[:-1], objective, "loss")
    return loss


def _check_shape(value: Tensor, shape: torch.Size, objective: Objective, name: str) -> None:
    """A user's objective of another shape would be broadcast, and steer somewhere else."""
    if value.shape != shape:
        raise ValueError(
            f"the {name} of {objective!r} has shape {list(value.shape)}: it must be {list(shape)}, "
            "one value for each row and head" + (" and latent" if name == "gradient" else "")
        )
