"""K steps of projected gradient descent on any objective, and the record of what they did."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.objectives import Centroids, Latents, Objective


@dataclass(frozen=True, kw_only=True, eq=False)
class DescentResult:
    """Where the descent ended, and its loss on the way."""

    z: Float[Tensor, "*batch head d_latent"]
    """The latents after the last step."""

    loss: Float[Tensor, "steps *batch head"] | None
    """Loss before the first step and after each: `n_steps + 1` rows; None unless recorded."""


def descend(
    z: Latents,
    centroids: Centroids,
    target: int,
    objective: Objective,
    *,
    n_steps: int,
    step_size: float,
    lower: float | None = 0.0,
    record_loss: bool = False,
) -> DescentResult:
    """Move latents towards a class by projected gradient descent: z <- max(lower, z - s g(z)).

    Every row and head moves on its own. Zero steps and a step size of zero return `z` itself,
    bit for bit.

    Args:
        z: where to start, [*batch head d_latent].
        centroids: mean latent of each class and head, [class head d_latent].
        target: index of the target class.
        objective: what is minimised.
        n_steps: number of steps, 0 or more.
        step_size: s, 0 or more, in units of the objective's gradient.
        lower: least value a latent can take (0 for ReLU and TopK latents); None: no projection.
        record_loss: also return the loss of every step (one more evaluation a step).

    Returns:
        The latents at the end and, on request, the loss before and after each step.

    Raises:
        ValueError: `n_steps` or `step_size` is negative or not finite, or loss or gradient of the
            objective have other shapes than theirs.

    Source: arXiv 2502.18644 for gradient descent in the latent space; the projection onto the
    SAE's latent range is our choice, so that what is decoded stays a possible activation.
    """
    check_strength(n_steps, step_size)
    losses = [_loss(objective, z, centroids, target)] if record_loss else []
    for _ in range(n_steps):
        if step_size > 0:
            gradient = objective.gradient(z, centroids, target)
            _check_shape(gradient, z.shape, objective, "gradient")
            z = z - step_size * gradient
            if lower is not None:
                z = z.clamp(min=lower)
        if record_loss:
            losses.append(_loss(objective, z, centroids, target))
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


def _loss(objective: Objective, z: Latents, centroids: Centroids, target: int) -> Tensor:
    loss = objective.loss(z, centroids, target)
    _check_shape(loss, z.shape[:-1], objective, "loss")
    return loss


def _check_shape(value: Tensor, shape: torch.Size, objective: Objective, name: str) -> None:
    """A user's objective of another shape would be broadcast, and steer somewhere else."""
    if value.shape != shape:
        raise ValueError(
            f"the {name} of {objective!r} has shape {list(value.shape)}: it must be {list(shape)}, "
            "one value for each row and head" + (" and latent" if name == "gradient" else "")
        )
