"""K steps of projected gradient descent on any objective, by the fastest exact method.

The plain loop takes any objective. Some objectives allow faster methods with the same result:

- squared distance: z_K = p + (1 - s a)^K (z_0 - p) with a = sum_k w_k and p = c_w / a, if no latent
  would leave its range, that is s a <= 1 and z_0 and p lie in it;
- contrast, fixed move, linear probe: the gradient g is constant, so z_K = max(lower, z_0 - K s g);
- prototype without a lower bound: the trajectory lies in the span of the centroids, so K steps need
  only <z, c_k> and the Gram matrix of the centroids, whatever the number of latents;
- prototype with a lower bound: the same loop in place, with fewer operations per step.

In the first two latents move along a line: the trust region ends it, and the posteriors at all
steps are computed together to find the first step that reaches `until`. The plain loop remains
where latents meet the end of their range under squared distance, or of both range and trust region
under a constant gradient: the way then bends at every step, as it does for the other objectives.
"""

from collections.abc import Callable, Iterator
from functools import partial
from operator import mul
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
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
    class_scores,
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
    for name, value in (("n_steps", n_steps), ("step_size", step_size)):
        if not isinstance(value, Tensor):
            check_number(name, value, whole=name == "n_steps", least=0)
        elif not bool(((value >= 0) & value.isfinite()).all()):
            raise ValueError(f"{name} must be 0 or more and finite in every row, got {value}")
    numbers = not isinstance(n_steps, Tensor) and not isinstance(step_size, Tensor)
    if numbers and (n_steps == 0 or step_size == 0) and not record_loss:
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
            if not record_loss and not bool(moves.any()):
                break
        if bounds.movable is not None:
            moves = moves & bounds.movable
        moved = z - size * gradient
        if bounds.movable is not None:
            moved = torch.where(bounds.movable, moved, z)
        if bounds.radius is not None:
            way = moved - start
            norm = way.norm(dim=-1, keepdim=True)
            shorter = start + way * (bounds.radius / norm.clamp(min=bounds.radius))
            moved = torch.where(norm > bounds.radius, shorter, moved)
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
    lower = bounds.lower
    if lower is not None and z.numel() and float(z.detach().min()) < lower:
        return None  # the first step would raise a latent that a later one can lower again
    n_steps, step_size = _spread(n_steps, z), _spread(step_size, z)
    kind = type(objective)  # exactly: a subclass may have another gradient
    if isinstance(objective, PrototypeLogLikelihood) and kind is PrototypeLogLikelihood:
        return _prototype(z, goal, n_steps, step_size, objective.temperature, bounds)
    if kind is SquaredDistance:
        share = _share(goal, step_size, bounds)
        return share and _straight(z, z - goal.point, share, goal, n_steps, bounds)
    if kind in (CentroidContrast, FixedMove, LinearProbe):
        share = partial(mul, step_size)
        return _straight(z, objective.gradient(z, goal), share, goal, n_steps, bounds)
    return None


def _spread(value: Any, z: Tensor) -> Any:
    """Return a value for each row as [*batch 1 1], and a number unchanged."""
    return value.to(z)[..., None, None] if isinstance(value, Tensor) else value


def _share(goal: Goal, step_size: Any, bounds: Bounds) -> Callable[[Any], Any] | None:
    """Return n -> 1 - (1 - s a)^n, or None where a bound may cut steps of squared distance."""
    lower, total = bounds.lower, goal.total if goal.shared_total is None else goal.shared_total
    shrink = step_size * total
    if not torch.as_tensor(total > 0).all() or (lower is not None and goal.least_of_point < lower):
        return None
    bounded = lower is not None or bounds.radius is not None
    if bounded and torch.as_tensor(shrink > 1).any():
        return None
    if not isinstance(shrink, Tensor) and shrink > 2:
        # It diverges: a tensor overflows to infinity, where a Python number raises.
        shrink = torch.tensor(shrink, dtype=goal.point.dtype, device=goal.point.device)
    return lambda n: 1 - (1 - shrink) ** n


def _straight(
    z: Tensor, way: Tensor, share: Callable, goal: Goal, n_steps: Any, bounds: Bounds
) -> Tensor | None:
    """Return z - share(n) way after n steps, within bounds; None if they bend the way."""
    lower, movable, radius = bounds.lower, bounds.movable, bounds.radius
    if movable is not None:
        way = torch.where(movable, way, 0)
    length = None if radius is None else way.norm(dim=-1, keepdim=True)

    def after(n: Any, start: Tensor = z, way: Tensor = way) -> Tensor:
        taken = share(n)
        if length is not None:
            taken = taken * (radius / (taken * length).clamp(min=radius))
        if not isinstance(taken, Tensor):
            return torch.sub(start, way, alpha=taken)
        return start - taken * way

    if bounds.until is not None:
        scores = partial(class_scores, centroids=goal.centroids, temperature=bounds.temperature)
        if lower is not None and bool((after(n_steps) < lower).any()):
            path, like = (lambda n: scores(after(n).clamp(min=lower))), z
        else:  # scores are linear in the latents
            like = einsum(way, goal.centroids, "... head d, k head d -> ... head k")
            path = partial(after, start=scores(z), way=like / bounds.temperature)
        n_steps = _steps_until(path, like, goal, n_steps, bounds.until)
    end = after(n_steps)
    if lower is not None:
        reached = False if length is None else share(n_steps) * length > radius
        if length is not None and bool((reached & (end < lower)).any()):
            return None
        end = end.clamp(min=lower)
    return end if movable is None else torch.where(movable, end, z)


@torch.no_grad()
def _steps_until(
    scores: Callable[[Tensor], Tensor], like: Tensor, goal: Goal, n_steps: Any, until: float
) -> Tensor:
    """Return how many steps each row and head takes, [*batch head 1], from class scores after n.

    `like` has the shape of what is computed for one n: at first for 8 together, then for more.
    """
    first, size, most = 0, 8, max(1, 2**20 // max(1, like.numel()))
    taken = torch.zeros_like(like[..., 0])
    going = taken + 1
    while first < _most(n_steps) and bool(going.any()):
        n = first + torch.arange(min(size, most)).to(like).view(-1, *[1] * like.ndim)
        posterior = (scores(n).softmax(-1) * goal.wanted[..., None, :]).sum(-1)
        below = (posterior < until).to(like).cumprod(0) * going
        taken, going = taken + below.sum(0), below[-1]
        first, size = first + len(n), 2 * size
    return torch.minimum(taken[..., None], torch.as_tensor(n_steps, device=like.device))


def _prototype(
    z: Tensor, goal: Goal, n_steps: Any, step_size: Any, temperature: float, bounds: Bounds
) -> Tensor | None:
    """Descend in place, with few operations per step, over all rows of a head at once."""
    if (z.requires_grad or goal.centroids.requires_grad) and torch.is_grad_enabled():
        return None  # in-place operations have no gradient
    until, radius = bounds.until, bounds.radius
    if until is not None and bounds.temperature != temperature:
        return None  # the loop has the posteriors of its own temperature only

    def by_head(latents: Tensor) -> Tensor:
        return rearrange(latents, "... head d -> head (...) d")

    latents = by_head(z).clone(memory_format=torch.contiguous_format)
    norms, centroids = goal.half_squares, goal.by_head
    if temperature != 1:
        norms, centroids = norms / temperature, centroids / temperature
    # Rows last: the long product is fastest this way.
    scores = torch.baddbmm(norms, centroids, latents.mT, beta=-1)  # [head class row]
    basis, steps = _steps(goal, n_steps, step_size, temperature, scores, until)
    if bounds.lower is None and bounds.movable is None:
        # The latents stay in the span of the centroids: only the scores need to move.
        products, moved = centroids @ basis.mT, torch.zeros_like(scores)
        first, gram = scores.clone(), basis @ basis.mT
        for taken in steps:
            moved += taken
            if radius is not None:
                norm = (moved * (gram @ moved)).sum(1, keepdim=True).clamp(min=0).sqrt()
                moved *= radius / norm.clamp(min=radius)
            torch.baddbmm(first, products, moved, alpha=-1, out=scores)
        latents.baddbmm_(moved.mT, basis, alpha=-1)
        return latents.transpose(0, 1).reshape(z.shape)
    still = None if bounds.movable is None else ~by_head(bounds.movable.expand(z.shape))
    start = latents.clone()
    for taken in steps:
        latents.baddbmm_(taken.mT, basis, alpha=-1)
        if still is not None:
            torch.where(still, start, latents, out=latents)
        if radius is not None:
            norm = latents.sub_(start).norm(dim=-1, keepdim=True)
            latents.mul_(radius / norm.clamp(min=radius)).add_(start)
        if bounds.lower is not None:
            latents.clamp_(min=bounds.lower)
        torch.baddbmm(norms, centroids, latents.mT, beta=-1, out=scores)
    return latents.transpose(0, 1).reshape(z.shape)


def _steps(
    goal: Goal, n_steps: Any, step_size: Any, temperature: float, scores: Tensor, until: Any
) -> tuple[Tensor, Iterator[Tensor]]:
    """Return a basis [head class d_latent] and each step's share of it [head class row].

    A step subtracts a (s sum_k p_k c_k - c_w) from the latents, a the step size over T. If all rows
    share weights, steps and sizes, that is sum_k p_k a (s c_k - c_w), because p sums to 1: a step
    then costs no more than the posterior. Each step reads the current `scores`, and takes nothing
    where the posterior of the target has reached `until`.
    """
    taken, rate, total = torch.empty_like(scores), step_size / temperature, goal.shared_total
    numbers = not isinstance(rate, Tensor) and not isinstance(n_steps, Tensor) and until is None
    if total is not None and numbers:
        basis = rate * (total * goal.by_head - goal.pull[:, None])
        return basis, (torch.softmax(scores, 1, out=taken) for _ in range(n_steps))

    def by_row(value: Any) -> Tensor:
        value = torch.atleast_1d(torch.as_tensor(value, dtype=scores.dtype, device=scores.device))
        return rearrange(value, "... k -> 1 k (...)")

    wanted, totals, left = by_row(goal.weights), by_row(goal.total[..., 0]), by_row(n_steps)
    rates, aims = by_row(rate), by_row(goal.wanted)

    def each() -> Iterator[Tensor]:
        for step in range(_most(n_steps)):
            torch.softmax(scores, 1, out=taken)
            moves = left > step
            if until is not None:
                moves = moves & ((taken * aims).sum(1, keepdim=True) < until)
                if not bool(moves.any()):
                    return
            yield taken.mul_(totals).sub_(wanted).mul_(rates * moves)

    # What is taken sums to 0: taking the mean off changes no step, and makes norms exact.
    return goal.by_head - goal.by_head.mean(1, keepdim=True), each()
