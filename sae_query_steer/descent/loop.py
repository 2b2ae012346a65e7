"""K steps of projected gradient descent on any objective, by the fastest exact method.

The plain loop takes any objective. Some objectives allow faster methods with the same result:

- squared distance: z_K = p + (1 - s a)^K (z_0 - p) with a = sum_k w_k and p = c_w / a, if no latent
  would leave its range, that is s a <= 1 and z_0 and p lie in it;
- contrast, fixed move, linear probe: the gradient g is constant, so z_K = max(lower, z_0 - K s g);
- prototype without a lower bound: the trajectory lies in the span of the centroids, so K steps need
  only <z, c_k> and the Gram matrix of the centroids, whatever the number of latents;
- prototype with a lower bound: the same loop in place, with fewer operations per step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.descent.control import Bounds
from sae_query_steer.descent.goals import Goal, Latents
from sae_query_steer.descent.objectives import (
    CentroidContrast,
    FixedMove,
    LinearProbe,
    Objective,
    PrototypeLogLikelihood,
    SquaredDistance,
    posterior_of_target,
)
from sae_query_steer.scopes.positions import check_result

Steps = int | Int[Tensor, "*#batch"]
StepSize = float | Float[Tensor, "*#batch"]


class DescentResult(NamedTuple):
    """The final latents, and the loss of every step if recorded."""

    z: Latents
    """The latents after the last step."""

    loss: Float[Tensor, "steps *batch head"] | None = None
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
    bounds = bounds or Bounds()
    if isinstance(n_steps, int) and isinstance(step_size, int | float):
        check_number("n_steps", n_steps, whole=True, least=0)
        check_number("step_size", step_size, least=0)
        if (n_steps == 0 or step_size == 0) and not record_loss:
            return DescentResult(z)
    fast = fast_descent(z, goal, objective, n_steps, step_size, bounds)
    if fast is not None and not record_loss:
        return DescentResult(fast)
    slow = plain_descent(z, goal, objective, n_steps, step_size, bounds, record_loss)
    if fast is None or slow.loss is None:
        return slow
    # Recording must not change the result.
    return DescentResult(fast, torch.cat([slow.loss[:-1], _loss(objective, fast, goal)[None]]))


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

    The order in each step: only rows and heads that have steps left and have not reached `until`
    move; in these the movable latents take the step; the way from the start of all latents is
    shortened to the trust region; the lower bound is applied. The start satisfies the last two, so
    neither undoes the other.
    """
    left = torch.as_tensor(n_steps, device=z.device)[..., None, None]
    size = torch.as_tensor(step_size, device=z.device, dtype=z.dtype)[..., None, None]
    start, losses = z, [_loss(objective, z, goal)] if record_loss else []
    for step in range(_most(left)):
        gradient = objective.gradient(z, goal)
        check_result(gradient, z.shape, f"the gradient of {objective!r}")
        moves = (left > step) & (size > 0)
        if bounds.until is not None:
            posterior = posterior_of_target(z, goal, bounds.temperature)
            moves = moves & (posterior < bounds.until)[..., None]
        if bounds.movable is not None:
            moves = moves & bounds.movable
        moved = z - size * gradient
        if bounds.movable is not None:
            moved = torch.where(bounds.movable, moved, z)
        if bounds.radius is not None:
            way = moved - start
            norm = way.norm(dim=-1, keepdim=True)
            moved = torch.where(norm > bounds.radius, start + way * (bounds.radius / norm), moved)
        if bounds.lower is not None:
            moved = moved.clamp(min=bounds.lower)
        z = torch.where(moves, moved, z)
        if record_loss:
            losses.append(_loss(objective, z, goal))
    return DescentResult(z, torch.stack(losses) if record_loss else None)


def _loss(objective: Objective, z: Latents, goal: Goal) -> Tensor:
    return check_result(objective.loss(z, goal), z.shape[:-1], f"the loss of {objective!r}")


def _most(n_steps: int | Tensor) -> int:
    if isinstance(n_steps, Tensor):
        return int(n_steps.max()) if n_steps.numel() else 0
    return n_steps


def fast_descent(
    z: Latents,
    goal: Goal,
    objective: Objective,
    n_steps: Steps,
    step_size: StepSize,
    bounds: Bounds,
) -> Latents | None:
    """Return the end of a descent, or None if only the plain loop applies; Args as `descend`."""
    lower, movable = bounds.lower, bounds.movable
    if bounds.radius is not None or bounds.until is not None:
        return None
    if lower is not None and z.numel() and float(z.detach().min()) < lower:
        return None  # the first step would raise a latent that a later one can lower again
    n_steps, step_size = _spread(n_steps, z), _spread(step_size, z)
    kind = type(objective)  # exactly: a subclass may have another gradient
    if kind is SquaredDistance:
        end = _squared_distance(z, goal, n_steps, step_size, lower)
    elif kind in (CentroidContrast, FixedMove, LinearProbe):
        end = z - n_steps * step_size * objective.gradient(z, goal)
        end = end if lower is None else end.clamp(min=lower)
    elif isinstance(objective, PrototypeLogLikelihood) and kind is PrototypeLogLikelihood:
        end = _prototype(z, goal, n_steps, step_size, objective.temperature, bounds)
    else:
        return None
    return end if end is None or movable is None else torch.where(movable, end, z)


def _spread(value: Any, z: Tensor) -> Any:
    """Return a value for each row as [*batch 1 1], and a number unchanged."""
    return value.to(z.device)[..., None, None] if isinstance(value, Tensor) else value


def _squared_distance(
    z: Tensor, goal: Goal, n_steps: Any, step_size: Any, lower: float | None
) -> Tensor | None:
    total = goal.total if goal.shared_total is None else goal.shared_total
    shrink = step_size * total
    if not torch.as_tensor(total > 0).all():
        return None
    if lower is not None and (goal.least_of_point < lower or torch.as_tensor(shrink > 1).any()):
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
    if (z.requires_grad or goal.centroids.requires_grad) and torch.is_grad_enabled():
        return None  # in-place operations have no gradient

    def by_head(latents: Tensor) -> Tensor:
        return rearrange(latents, "... head d -> head (...) d")

    latents = by_head(z).clone(memory_format=torch.contiguous_format)
    norms, centroids = goal.half_squares, goal.by_head
    if temperature != 1:
        norms, centroids = norms / temperature, centroids / temperature
    # Rows last: the long product is fastest this way.
    scores = torch.baddbmm(norms, centroids, latents.mT, beta=-1)  # [head class row]
    basis, take = _steps(goal, n_steps, step_size, temperature, scores)
    if bounds.lower is None and bounds.movable is None:
        # The latents stay in the span of the centroids: only the scores need to move.
        products, moved = centroids @ basis.mT, torch.zeros_like(scores)
        for step in range(_most(n_steps)):
            taken = take(step)
            moved += taken
            scores.baddbmm_(products, taken, alpha=-1)
        latents.baddbmm_(moved.mT, basis, alpha=-1)
        return latents.transpose(0, 1).reshape(z.shape)
    still = None if bounds.movable is None else ~by_head(bounds.movable.expand(z.shape))
    start = latents.clone()
    for step in range(_most(n_steps)):
        latents.baddbmm_(take(step).mT, basis, alpha=-1)
        if bounds.lower is not None:
            latents.clamp_(min=bounds.lower)
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

    def by_row(value: Any) -> Tensor:
        value = torch.atleast_1d(torch.as_tensor(value, device=scores.device))
        return rearrange(value, "... k -> 1 k (...)")

    wanted, totals, left = by_row(goal.weights), by_row(goal.total[..., 0]), by_row(n_steps)
    rates = by_row(rate).to(scores)

    def take(step: int) -> Tensor:
        torch.softmax(scores, 1, out=taken)
        return taken.mul_(totals).sub_(wanted).mul_(rates * (left > step))

    return goal.by_head, take
