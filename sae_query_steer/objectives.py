"""What "towards the target" means: small values with a loss and its analytic gradient.

One convention throughout: distances enter as d_k = 1/2 ||z - c_k||^2, so that the gradient of a
distance is z - c_k, without a factor. An objective is minimised. Latents are [*batch head
d_latent]; every head has centroids of its own and moves on its own.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "*batch head d_latent"]
Centroids = Float[Tensor, "class head d_latent"]


@runtime_checkable
class Objective(Protocol):
    """A loss over latents, zero-cost to look at, with its gradient in closed form."""

    def loss(self, z: Latents, centroids: Centroids, target: int) -> Float[Tensor, "*batch head"]:
        """Return the loss of each row and head; lower is nearer to the target."""
        ...

    def gradient(self, z: Latents, centroids: Centroids, target: int) -> Latents:
        """Return the gradient of the loss with respect to `z`."""
        ...


@dataclass(frozen=True)
class SquaredDistance:
    """1/2 ||z - c_t||^2, half the squared distance to the target centroid.

    Source: arXiv 2502.18644 (gradient descent on the distance to the target class); the factor
    1/2 is our choice, so that `step_size=1` reaches the centroid in one step.
    """

    def loss(self, z: Latents, centroids: Centroids, target: int) -> Float[Tensor, "*batch head"]:
        """Return 1/2 ||z - c_t||^2."""
        return (z - centroids[target]).square().sum(-1) / 2

    def gradient(self, z: Latents, centroids: Centroids, target: int) -> Latents:
        """Return z - c_t."""
        return z - centroids[target]


@dataclass(frozen=True)
class PrototypeLogLikelihood:
    """-log p_t with p = softmax_k(-d_k / T): the negative log posterior of the target class.

    The step grows with the doubt that remains: a latent that already belongs to the target class
    is hardly moved. `temperature=0.5` gives the softmax over full squared distances.

    Source: our choice of form; arXiv 2605.23040 calls its class centroids prototypes.
    """

    temperature: float = 1.0
    """T > 0, in units of half a squared distance: larger is softer."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature={self.temperature} is not allowed: give a finite number above 0 "
                "(1.0 is the usual start)"
            )

    def loss(self, z: Latents, centroids: Centroids, target: int) -> Float[Tensor, "*batch head"]:
        """Return -log p_t."""
        return -class_scores(z, centroids, self.temperature).log_softmax(-1)[..., target]

    def gradient(self, z: Latents, centroids: Centroids, target: int) -> Latents:
        """Return (sum_k p_k c_k - c_t) / T."""
        posterior = class_scores(z, centroids, self.temperature).softmax(-1)
        expected = einsum(posterior, centroids, "... head k, k head d -> ... head d")
        return (expected - centroids[target]) / self.temperature


@dataclass(frozen=True)
class CentroidContrast:
    """-<z, c_t - c_mean>: along the line from the mean of the class centroids to the target.

    Linear, so every step is the same and n steps of size s are one step of n * s, up to the
    latent range. Over an identity encoder this is the mean-difference direction.

    Source: our choice; the mean difference is that of contrastive activation addition.
    """

    def loss(self, z: Latents, centroids: Centroids, target: int) -> Float[Tensor, "*batch head"]:
        """Return -<z, c_t - c_mean>."""
        return -(z * self._direction(centroids, target)).sum(-1)

    def gradient(self, z: Latents, centroids: Centroids, target: int) -> Latents:
        """Return c_mean - c_t, the same at every latent."""
        return -self._direction(centroids, target).expand_as(z)

    @staticmethod
    def _direction(centroids: Centroids, target: int) -> Float[Tensor, "head d_latent"]:
        return centroids[target] - centroids.mean(0)


def class_scores(
    z: Latents, centroids: Centroids, temperature: float = 1.0
) -> Float[Tensor, "*batch head class"]:
    """Return (<z, c_k> - 1/2 ||c_k||^2) / T for every class.

    This is -d_k / T without the term 1/2 ||z||^2 / T that all classes share: softmax and argmax
    over the classes are the same, and nothing large cancels.
    """
    inner = einsum(z, centroids, "... head d, k head d -> ... head k")
    norms = rearrange(centroids.square().sum(-1), "k head -> head k")
    return (inner - norms / 2) / temperature


def squared_distances(z: Latents, centroids: Centroids) -> Float[Tensor, "*batch head class"]:
    """Return ||z - c_k||^2 for every class, without the factor 1/2.

    Computed as it is written, class by class: the expanded square loses the digits that matter
    once a latent is near a centroid.
    """
    return torch.stack([(z - centroid).square().sum(-1) for centroid in centroids], -1)
