"""Steering objectives: loss and closed-form gradient.

All objectives are minimised. Distances enter as d_k = 1/2 ||z - c_k||^2, so the gradient of a
distance is z - c_k. Latents are [*batch head d_latent]; every head has its own centroids and moves
independently. With class weights w_k, s = sum_k w_k and c_w = sum_k w_k c_k.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.descent.goals import Centroids, Goal, Latents

Loss = Float[Tensor, "*batch head"]
"""The loss of each row and head."""


@runtime_checkable
class Objective(Protocol):
    """A loss over latents with a closed-form gradient."""

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return the loss of each row and head; lower is nearer to the target."""
        ...

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return the gradient of the loss with respect to `z`."""
        ...


@dataclass(frozen=True)
class SquaredDistance:
    """sum_k w_k 1/2 ||z - c_k||^2: for a single target, half the squared distance to it.

    Source: arXiv 2502.18644 (gradient descent on the distance to the target class); the factor
    1/2 is our choice, so that `step_size=1` reaches the centroid in one step.
    """

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return sum_k w_k 1/2 ||z - c_k||^2."""
        return goal.weighted(squared_distances(z, goal.centroids)) / 2

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return s z - c_w."""
        return goal.total * z - goal.pull


@dataclass(frozen=True)
class PrototypeLogLikelihood:
    """-sum_k w_k log p_k with p = softmax_k(-d_k / T): the negative log posterior of the target.

    The gradient vanishes as the posterior of the target approaches 1. `temperature=0.5` gives the
    softmax over full squared distances.

    Source: our choice of form; arXiv 2605.23040 calls its class centroids prototypes.
    """

    temperature: float = 1.0
    """T > 0, in units of half a squared distance: larger is softer."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0)

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return -sum_k w_k log p_k."""
        return -goal.weighted(class_scores(z, goal.centroids, self.temperature).log_softmax(-1))

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return (s sum_k p_k c_k - c_w) / T."""
        posterior = class_scores(z, goal.centroids, self.temperature).softmax(-1)
        factors = goal.total * posterior - goal.weights[..., None, :]
        return mixed(factors, goal.centroids) / self.temperature


class _Linear(ABC):
    """`-<z, direction>`: an objective whose gradient is the same at every latent."""

    @abstractmethod
    def direction(self, goal: Goal) -> Latents:
        """Return the direction."""

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return `-<z, direction>`."""
        return -(z * self.direction(goal)).sum(-1)

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return minus the direction, the same at every latent."""
        return -self.direction(goal).expand_as(z)


@dataclass(frozen=True)
class CentroidContrast(_Linear):
    """`-<z, c_w - s c_mean>`: along the line from the mean of the class centroids to the target.

    Linear: n steps of size s equal one step of size n * s, up to the latent range. Over an
    identity encoder this is the mean-difference direction.

    Source: our choice; the mean difference is that of contrastive activation addition.
    """

    def direction(self, goal: Goal) -> Latents:
        """Return c_w - s c_mean."""
        return goal.pull - goal.total * goal.centroids.mean(0)


@dataclass(frozen=True)
class FixedMove(_Linear):
    """`-<z, m_w>`: latents move by the target's own move, wherever they are.

    For targets that hold moves and no points, see `LearnedTargets`: n steps of size s add n * s
    times the move, up to the latent range.

    Source: a static sparse vector; learning it through the model is our choice.
    """

    def direction(self, goal: Goal) -> Latents:
        """Return m_w."""
        return goal.pull


@dataclass(frozen=True)
class CosineSimilarity:
    """`-<z, u> / n` with u = c_w / ||c_w|| and n = sqrt(||z||^2 + (softening ||c_w||)^2).

    The softened cosine to the target. Without softening the gradient is unbounded at z = 0, a
    common value of sparse latents.

    Source: our choice.
    """

    softening: float = 0.1
    """Above 0: latents whose norm is below this share of the target's norm count as small."""

    def __post_init__(self) -> None:
        check_number("softening", self.softening, above=0)

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return `-<z, u> / n`."""
        unit, norm = self._parts(z, goal)
        return -(z * unit).sum(-1) / norm[..., 0]

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return `<z, u> z / n^3 - u / n`."""
        unit, norm = self._parts(z, goal)
        return (z * unit).sum(-1, keepdim=True) * z / norm**3 - unit / norm

    def _parts(self, z: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
        size = goal.pull.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(z.dtype).eps)
        square = z.square().sum(-1, keepdim=True)
        return goal.pull / size, (square + (self.softening * size).square()).sqrt()


@dataclass(frozen=True)
class GaussianLogLikelihood:
    """-sum_k w_k log N(z; c_k, diag(v_k + floor)), up to a constant: distances scaled by variance.

    Steps are stable below 2 (v + floor) / s for the smallest variance v.

    Source: our choice; the variances are those of the centroids.
    """

    floor: float = 1e-2
    """Added to every variance, above 0: latents that never fire in a class have variance 0."""

    def __post_init__(self) -> None:
        check_number("floor", self.floor, above=0)

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return sum_k w_k 1/2 ||(z - c_k) / sqrt(v_k + floor)||^2."""
        return goal.weighted(squared_distances(z, goal.centroids, self._precision(goal))) / 2

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return sum_k w_k (z - c_k) / (v_k + floor)."""
        precision, weights = self._precision(goal), goal.weights[..., None, :]
        return z * mixed(weights, precision) - mixed(weights, precision * goal.centroids)

    def _precision(self, goal: Goal) -> Centroids:
        return 1 / (goal.known_variances + self.floor)


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """`-(<z, weight> + bias)`: the negative logit of a linear probe trained on the latents.

    The target must be one of the classes; it only scales the logit by its weight.

    Source: our choice.
    """

    weight: Float[Tensor, "head d_latent"]
    """The probe of each head."""

    bias: float = 0.0
    """Added to the logit; does not affect the gradient."""

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return minus the logit, times the sum of the class weights."""
        return -((z * self.weight.to(z)).sum(-1) + self.bias) * goal.total[..., 0]

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return minus the probe's weight, the same at every latent."""
        return (-goal.total * self.weight.to(z)).expand_as(z)


@dataclass(frozen=True)
class AutogradObjective:
    """Any differentiable loss of latents, with the gradient by autograd.

    Slower than a closed form. Works in inference mode, as in `generate`.

    Source: our choice.
    """

    function: Callable[[Tensor, Goal], Tensor] = field(repr=False)
    """From latents [*batch head d_latent] and the goal to a loss [*batch head]."""

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return the value of the function."""
        return self.function(z, goal)

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return its gradient, independently for each row and head."""
        with torch.inference_mode(False), torch.enable_grad():
            tensors = {f.name: getattr(goal, f.name) for f in fields(goal)}
            copies: Any = {name: t if t is None else t.clone() for name, t in tensors.items()}
            plain = Goal(**copies)
            leaf = z.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.function(leaf, plain).sum(), leaf)
        return gradient


def class_scores(
    z: Latents, centroids: Centroids, temperature: float = 1.0
) -> Float[Tensor, "*batch head class"]:
    """Return `(<z, c_k> - 1/2 ||c_k||^2) / T` for every class.

    Equal to -d_k / T up to the term 1/2 ||z||^2 / T, which is the same for all classes and cancels
    in softmax and argmax; leaving it out avoids a loss of precision.
    """
    inner = einsum(z, centroids, "... head d, k head d -> ... head k")
    return (inner - centroids.square().sum(-1).mT / 2) / temperature


def posterior_of_target(
    z: Latents, goal: Goal, temperature: float = 1.0
) -> Float[Tensor, "*batch head"]:
    """Return the probability that a latent belongs to one of the classes `goal.wanted`.

    The class posterior is softmax_k(-1/2 ||z - c_k||^2 / T); the size of the weights has no
    effect. Source: our choice.
    """
    posterior = class_scores(z, goal.centroids, temperature).softmax(-1)
    return (posterior * goal.wanted[..., None, :]).sum(-1)


def squared_distances(
    z: Latents, centroids: Centroids, precision: Centroids | None = None
) -> Float[Tensor, "*batch head class"]:
    """Return ||z - c_k||^2 for every class, each coordinate times its `precision` if given.

    Computed from the differences: the expanded square is inaccurate close to a centroid.
    """
    scales = torch.ones_like(centroids) if precision is None else precision
    pairs = zip(centroids, scales, strict=True)
    return torch.stack([((z - c).square() * scale).sum(-1) for c, scale in pairs], -1)


def mixed(weights: Float[Tensor, "*batch #head class"], values: Centroids) -> Latents:
    """Return the weighted sum over classes; weights with a head axis of 1 serve all heads."""
    weights = weights.expand(*weights.shape[:-2], values.shape[1], -1)
    return einsum(weights, values, "... head k, k head d -> ... head d")
