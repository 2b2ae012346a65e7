"""What "towards the target" means: small values with a loss and its analytic gradient.

One convention throughout: distances enter as d_k = 1/2 ||z - c_k||^2, so that the gradient of a
distance is z - c_k, without a factor. An objective is minimised. Latents are [*batch head
d_latent]; every head has centroids of its own and moves on its own. With weights w_k of the
classes the losses are sums over the classes; s = sum_k w_k, and c_w = sum_k w_k c_k.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.descent.goals import Centroids, Goal, Latents

Loss = Float[Tensor, "*batch head"]
"""The loss of each row and head."""


@runtime_checkable
class Objective(Protocol):
    """A loss over latents, zero-cost to look at, with its gradient in closed form."""

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return the loss of each row and head; lower is nearer to the target."""
        ...

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return the gradient of the loss with respect to `z`."""
        ...


@dataclass(frozen=True)
class SquaredDistance:
    """sum_k w_k 1/2 ||z - c_k||^2: for a single target half the squared distance to it.

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

    The step grows with the doubt that remains: a latent that already belongs to the target class
    is hardly moved. `temperature=0.5` gives the softmax over full squared distances.

    Source: our choice of form; arXiv 2605.23040 calls its class centroids prototypes.
    """

    temperature: float = 1.0
    """T > 0, in units of half a squared distance: larger is softer."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return -sum_k w_k log p_k."""
        return -goal.weighted(class_scores(z, goal.centroids, self.temperature).log_softmax(-1))

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return (s sum_k p_k c_k - c_w) / T."""
        posterior = class_scores(z, goal.centroids, self.temperature).softmax(-1)
        return mixed(goal.total * posterior - goal.weights[..., None, :], goal.centroids) / (
            self.temperature
        )


@dataclass(frozen=True)
class CentroidContrast:
    """`-<z, c_w - s c_mean>`: along the line from the mean of the class centroids to the target.

    Linear, so every step is the same and n steps of size s are one step of n * s, up to the
    latent range. Over an identity encoder this is the mean-difference direction.

    Source: our choice; the mean difference is that of contrastive activation addition.
    """

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return `-<z, c_w - s c_mean>`."""
        return -(z * self.direction(goal)).sum(-1)

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return s c_mean - c_w, the same at every latent."""
        return -self.direction(goal).expand_as(z)

    @staticmethod
    def direction(goal: Goal) -> Float[Tensor, "*batch head d_latent"]:
        """Return c_w - s c_mean."""
        return goal.pull - goal.total * goal.centroids.mean(0)


@dataclass(frozen=True)
class CosineSimilarity:
    """`-<z, u> / n` with u = c_w / ||c_w|| and n = sqrt(||z||^2 + (softening ||c_w||)^2).

    The angle to the target, whatever the size of the latents; softened, because the cosine has no
    bounded gradient at a latent of zero, which sparse latents often are.

    Source: our choice.
    """

    softening: float = 0.1
    """Above 0: latents of this share of the target's norm count as small."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.softening) and self.softening > 0):
            raise ValueError(
                f"softening={self.softening} is not allowed: give a finite number above 0"
            )

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
    """-sum_k w_k log N(z; c_k, diag(v_k + floor)), up to a constant: distance in units of spread.

    A latent that varies little within the class is pulled hard, one that varies much hardly; the
    size of a stable step is that of the least variance: below 2 (v + floor) / s.

    Source: our choice; the variances are those of the centroids.
    """

    floor: float = 1e-2
    """Added to every variance, above 0: a latent that never fires in a class has none."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.floor) and self.floor > 0):
            raise ValueError(f"floor={self.floor} is not allowed: give a finite number above 0")

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return sum_k w_k 1/2 ||(z - c_k) / sqrt(v_k + floor)||^2."""
        pairs = zip(goal.centroids, self._precision(goal), strict=True)
        each = [((z - centroid).square() * precision).sum(-1) for centroid, precision in pairs]
        return goal.weighted(torch.stack(each, -1)) / 2

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return sum_k w_k (z - c_k) / (v_k + floor)."""
        precision = self._precision(goal)
        return z * mixed(goal.weights[..., None, :], precision) - mixed(
            goal.weights[..., None, :], precision * goal.centroids
        )

    def _precision(self, goal: Goal) -> Centroids:
        if goal.variances is None:
            raise ValueError(f"{self!r} needs the variances of the classes: give Goal(variances=)")
        return 1 / (goal.variances + self.floor)


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """`-(<z, weight> + bias)`: the logit of a linear probe that somebody trained on the latents.

    It knows its direction by itself: the target only has to be some class, whose weight scales it.

    Source: our choice.
    """

    weight: Float[Tensor, "head d_latent"]
    """The probe of each head."""

    bias: float = 0.0
    """Added to the logit; moves nothing."""

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return minus the logit, times the sum of the weights."""
        return -((z * self.weight.to(z)).sum(-1) + self.bias) * goal.total[..., 0]

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return minus the probe's weight, the same at every latent."""
        return (-goal.total * self.weight.to(z)).expand_as(z)


@dataclass(frozen=True)
class AutogradObjective:
    """Any differentiable loss of latents, with the gradient by autograd: slow, and sure.

    Works inside `generate` too, which runs in inference mode.

    Source: our choice.
    """

    function: Callable[[Tensor, Goal], Tensor] = field(repr=False)
    """From latents [*batch head d_latent] and the goal to a loss [*batch head]."""

    name: str = "function"
    """How it prints."""

    def loss(self, z: Latents, goal: Goal) -> Loss:
        """Return what the function says."""
        return self.function(z, goal)

    def gradient(self, z: Latents, goal: Goal) -> Latents:
        """Return its gradient, each row and head on its own."""
        with torch.inference_mode(False), torch.enable_grad():
            plain = Goal(
                centroids=goal.centroids.clone(),
                weights=goal.weights.clone(),
                variances=None if goal.variances is None else goal.variances.clone(),
            )
            leaf = z.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.function(leaf, plain).sum(), leaf)
        return gradient


def class_scores(
    z: Latents, centroids: Centroids, temperature: float = 1.0
) -> Float[Tensor, "*batch head class"]:
    """Return `(<z, c_k> - 1/2 ||c_k||^2) / T` for every class.

    This is -d_k / T without the term 1/2 ||z||^2 / T that all classes share: softmax and argmax
    over the classes are the same, and nothing large cancels.
    """
    inner = einsum(z, centroids, "... head d, k head d -> ... head k")
    norms = rearrange(centroids.square().sum(-1), "k head -> head k")
    return (inner - norms / 2) / temperature


def posterior_of_target(
    z: Latents, goal: Goal, temperature: float = 1.0
) -> Float[Tensor, "*batch head"]:
    """Return the probability that a latent belongs to a class that is wanted.

    The posterior of the classes is softmax_k(-1/2 ||z - c_k||^2 / T), and `Goal.wanted` are the
    classes of positive weight, whatever their weights; where the weights only lead away, the
    classes that they do not lead away from. Source: our choice.
    """
    posterior = class_scores(z, goal.centroids, temperature).softmax(-1)
    return (posterior * goal.wanted[..., None, :]).sum(-1)


def squared_distances(z: Latents, centroids: Centroids) -> Float[Tensor, "*batch head class"]:
    """Return ||z - c_k||^2 for every class, without the factor 1/2.

    Computed as it is written, class by class: the expanded square loses the digits that matter
    once a latent is near a centroid.
    """
    return torch.stack([(z - centroid).square().sum(-1) for centroid in centroids], -1)


def mixed(weights: Float[Tensor, "*batch #head class"], values: Centroids) -> Latents:
    """Return the weighted sum of a value of each class; weights of one head serve all."""
    return einsum(
        weights.expand(*weights.shape[:-2], values.shape[1], -1),
        values,
        "... head k, k head d -> ... head d",
    )


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless a temperature is a finite number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"temperature={temperature} is not allowed: give a finite number above 0 "
            "(1.0 is the usual start)"
        )
