"""K steps of projected gradient descent on any objective, by the fastest exact method.

The plain loop takes any objective. Some objectives allow faster methods with the same result:

- squared distance: z_K = p + (1 - s a)^K (z_0 - p) with a = sum_k w_k and p = c_w / a, if no latent
  would leave its range, that is s a <= 1 and z_0 and p lie in it;
- contrast and linear probe: the gradient g is constant, so z_K = max(lower, z_0 - K s g);
- prototype without a lower bound: the trajectory lies in the span of the centroids, so K steps need
  only <z, c_k> and the Gram matrix of the centroids, whatever the number of latents;
- prototype with a lower bound: the same loop in place, with fewer operations per step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.descent.control import Bounds
from sae_query_steer.descent.fast import fast_descent, max_steps
from sae_query_steer.descent.goals import Goal, Latents
from sae_query_steer.descent.objectives import Objective, check_result, posterior_of_target

Steps = int | Int[Tensor, "*batch"]
StepSize = float | Float[Tensor, "*batch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DescentResult:
    """The final latents, and the loss of every step if recorded."""

    z: Latents
    """The latents after the last step."""

    loss: Float[Tensor, "steps *batch head"] | None
    """Loss before the first step and after each: `n_steps + 1` rows; None unless recorded."""


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

    Every row and head moves independently. Zero steps or a step size of zero return `z` bitwise.
    The faster methods are exact: results equal those of `plain_descent` up to rounding.

    Args:
        z: initial latents, [*batch head d_latent].
        goal: the centroids and the weight of each class.
        objective: what is minimised.
        n_steps: number of steps, 0 or more; one for all rows, or one for each.
        step_size: s, 0 or more, in units of the objective's gradient; likewise.
        bounds: constraints; None means latents of 0 or more and no other constraint.
        record_loss: also return the loss of every step, computed by the plain loop.

    Raises:
        ValueError: `n_steps` or `step_size` is negative or not finite, or the objective returns a
            loss or gradient of the wrong shape.

    Source: arXiv 2502.18644 for gradient descent in the latent space; the projection onto the
    SAE's latent range and the faster methods are our choice.
    """
    bounds = Bounds() if bounds is None else bounds
    if isinstance(n_steps, int) and isinstance(step_size, int | float):
        check_number("n_steps", n_steps, whole=True, least=0)
        check_number("step_size", step_size, least=0)
        if (n_steps == 0 or step_size == 0) and not record_loss:
            return DescentResult(z=z, loss=None)
    fast = fast_descent(z, goal, objective, _spread(n_steps, z), _spread(step_size, z), bounds)
    if fast is not None and not record_loss:
        return DescentResult(z=fast, loss=None)
    slow = plain_descent(z, goal, objective, n_steps, step_size, bounds, record_loss)
    if fast is None or slow.loss is None:
        return slow
    # Recording must not change the result.
    last = _loss(objective, fast, goal)[None]
    return DescentResult(z=fast, loss=torch.cat([slow.loss[:-1], last]))


def plain_descent(
    z: Latents,
    goal: Goal,
    objective: Objective,
    n_steps: Steps,
    step_size: StepSize,
    bounds: Bounds,
    record_loss: bool = False,
) -> DescentResult:
    """Do the same as `descend` step by step: the reference for the faster methods.

    In each step the movable latents move, then the way from the start is shortened to the trust
    region, then the lower bound is applied; the start satisfies both, so neither undoes the other.
    """
    start, size, left = z, _spread(step_size, z, tensor=True), _spread(n_steps, z, tensor=True)
    losses = [_loss(objective, z, goal)] if record_loss else []
    for step in range(max_steps(left)):
        gradient = objective.gradient(z, goal)
        check_result(gradient, z.shape, f"the gradient of {objective!r}")
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


def _spread(value: Any, z: Tensor, tensor: bool = False) -> Any:
    """Return a value for each row as [*batch 1 1]; a number as it is, or as a tensor."""
    if isinstance(value, Tensor):
        return value.to(z.device)[..., None, None]
    if not tensor:
        return value
    return torch.tensor(value, device=z.device, dtype=z.dtype if isinstance(value, float) else None)


def _loss(objective: Objective, z: Latents, goal: Goal) -> Tensor:
    loss = objective.loss(z, goal)
    check_result(loss, z.shape[:-1], f"the loss of {objective!r}")
    return loss
