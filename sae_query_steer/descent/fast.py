"""The faster ways of a descent, each exact; `descent` says which there are, and why."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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
    *,
    lower: float | None,
    movable: Bool[Tensor, "..."] | None,
) -> Latents | None:
    """Return where a descent ends, or None where only the plain loop knows.

    Args:
        z: where to start.
        goal: the centroids and how much each class is wanted.
        objective: what is minimised.
        n_steps: number of steps, a number or [*batch 1 1].
        step_size: step size, a number or [*batch 1 1].
        lower: least value of a latent; None if there is none.
        movable: latents that may move, [*batch head d_latent] or less; None means all.
    """
    if lower is not None and z.numel() and float(z.detach().min()) < lower:
        return None  # a step would lift some of it, and a later one lower it again
    given = (z, goal, n_steps, step_size)
    kind = type(objective)  # exactly these: a class derived from them may have another gradient
    if kind is SquaredDistance:
        end = _squared_distance(*given, lower=lower)
    elif kind in (CentroidContrast, LinearProbe):
        end = z - n_steps * step_size * objective.gradient(z, goal)
        end = end if lower is None else end.clamp(min=lower)
    elif isinstance(objective, PrototypeLogLikelihood) and kind is PrototypeLogLikelihood:
        end = _prototype(*given, objective.temperature, lower=lower, movable=movable)
    else:
        return None
    return end if end is None or movable is None else torch.where(movable, end, z)


def _squared_distance(
    z: Tensor,
    goal: Goal,
    n_steps: int | Tensor,
    step_size: float | Tensor,
    *,
    lower: float | None,
) -> Tensor | None:
    total = goal.total if goal.shared_total is None else goal.shared_total
    shrink = step_size * total
    if not _everywhere(total > 0):
        return None
    if lower is not None and (goal.least_of_point < lower or not _everywhere(shrink <= 1)):
        return None
    if not isinstance(shrink, Tensor) and shrink > 2:
        # It diverges: to infinity, where numbers of Python would raise.
        shrink = torch.tensor(shrink, dtype=z.dtype, device=z.device)
    left = (1 - shrink) ** n_steps
    # Where nothing is left to do, the start itself, not the start up to rounding.
    if not isinstance(left, Tensor):
        return z if left == 1 else torch.lerp(z, goal.point, 1 - left)
    return torch.where(left == 1, z, torch.lerp(z, goal.point, (1 - left).to(z)))


def _prototype(
    z: Tensor,
    goal: Goal,
    n_steps: int | Tensor,
    step_size: float | Tensor,
    temperature: float,
    *,
    lower: float | None,
    movable: Tensor | None,
) -> Tensor | None:
    """Descend in place, few operations a step, each over all rows of a head at once."""
    if z.requires_grad and torch.is_grad_enabled():
        return None  # what is written in place has no gradient
    n_heads, d_latent = z.shape[-2:]
    latents = z.reshape(-1, n_heads, d_latent).transpose(0, 1)  # [head row d_latent]
    latents = latents.clone(memory_format=torch.contiguous_format)  # it is written to
    norms, centroids = goal.half_squares, goal.by_head
    if temperature != 1:
        norms, centroids = norms / temperature, centroids / temperature
    # Rows last: so the long product is the fastest.
    scores = torch.baddbmm(norms, centroids, latents.mT, beta=-1)  # [head class row]
    steps = _Steps(goal, n_steps, step_size, temperature, scores)
    if lower is None and movable is None:
        # The latents stay in the span of the centroids: only the scores need to move.
        products, moved = centroids @ steps.basis.mT, torch.zeros_like(scores)
        for step in range(steps.n):
            taken = steps.take(scores, step)
            moved += taken
            scores.baddbmm_(products, taken, alpha=-1)
        latents.baddbmm_(moved.mT, steps.basis, alpha=-1)
        return latents.transpose(0, 1).reshape(z.shape)
    still, start = None, latents
    if movable is not None:
        movable = movable.expand(z.shape).reshape(-1, n_heads, d_latent)
        still, start = ~movable.transpose(0, 1), latents.clone()
    for step in range(steps.n):
        latents.baddbmm_(steps.take(scores, step).mT, steps.basis, alpha=-1)
        if lower is not None:
            latents.clamp_(min=lower)
        if still is not None:
            torch.where(still, start, latents, out=latents)
        torch.baddbmm(norms, centroids, latents.mT, beta=-1, out=scores)
    return latents.transpose(0, 1).reshape(z.shape)


class _Steps:
    """What each step takes away from the latents: `take` times `basis`.

    A step takes away a (s sum_k p_k c_k - c_w) with a the step size over T. The posterior p sums to
    1: where all rows share weights, steps and sizes that is sum_k p_k a (s c_k - c_w), and a step
    costs no more than the posterior.
    """

    def __init__(
        self,
        goal: Goal,
        n_steps: int | Tensor,
        step_size: float | Tensor,
        temperature: float,
        scores: Tensor,
    ) -> None:
        self.n = n_steps if isinstance(n_steps, int) else _most(n_steps)
        self.basis = goal.by_head
        self._taken = torch.empty_like(scores)
        rate, total = step_size / temperature, goal.shared_total
        self._shared = total is not None and not isinstance(rate, Tensor)
        if isinstance(n_steps, Tensor):
            self._shared = False
        if self._shared:
            assert total is not None
            self.basis = rate * (total * self.basis - goal.pull[:, None])
            return
        n_rows = scores.shape[-1]
        self._wanted, self._total = _rows(goal.weights, n_rows), _rows(goal.total[..., 0], n_rows)
        self._rate = _rows(torch.as_tensor(rate).to(scores), n_rows)
        self._left = _rows(torch.as_tensor(n_steps, device=scores.device), n_rows)

    def take(self, scores: Tensor, step: int) -> Tensor:
        """Return how much of each row of the basis a step takes away, [head class row]."""
        torch.softmax(scores, 1, out=self._taken)
        if self._shared:
            return self._taken
        going = self._rate * (self._left > step)
        return self._taken.mul_(self._total).sub_(self._wanted).mul_(going)


def _rows(value: Tensor, n_rows: int) -> Tensor:
    """Return a value of all rows, or one for each row, as [1, 1 or class, 1 or row]."""
    if value.ndim == 0:
        return value.reshape(1, 1, 1)
    flat = value.reshape(-1, value.shape[-1])
    assert len(flat) in (1, n_rows)
    return flat.mT[None]


def _most(n_steps: Tensor) -> int:
    return int(n_steps.max()) if n_steps.numel() else 0


def _everywhere(condition: bool | Tensor) -> bool:
    return bool(condition.all()) if isinstance(condition, Tensor) else condition
