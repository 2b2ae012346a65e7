"""Where to go: the centroids of the classes, and how much each of them is wanted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

Latents = Float[Tensor, "*batch head d_latent"]
"""Latents of some heads of a site."""

Centroids = Float[Tensor, "class head d_latent"]
"""A latent of each class and head: its mean, or its variance."""

Target = str | Mapping[str, float | int]
"""A class, or weights of classes: {"apply": 1, "create": 0.5}; a negative weight leads away."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Goal:
    """The classes' centroids at one site, with the weight that each has for each token.

    A single target is weight 1 on one class. Weights need not sum to 1: only a negative weight
    leads away from a class, and weights that sum to 0 lead along a difference of classes.
    """

    centroids: Centroids
    """Mean latent of each class."""

    weights: Float[Tensor, "*batch class"]
    """Weight of each class: [class] for all tokens alike, or one row for each."""

    variances: Centroids | None = None
    """Variance of each latent within its class; objectives that need them say so."""

    @classmethod
    def towards(
        cls, centroids: Centroids, target: int, variances: Centroids | None = None
    ) -> "Goal":
        """Return the goal of a single class, by its index."""
        weights = torch.zeros(len(centroids), dtype=centroids.dtype, device=centroids.device)
        weights[target] = 1
        return cls(centroids=centroids, weights=weights, variances=variances)

    @cached_property
    def total(self) -> Float[Tensor, "*batch 1 1"]:
        """Sum of the weights, of the axes that latents have."""
        return self.weights.sum(-1)[..., None, None]

    @cached_property
    def shared_total(self) -> float | None:
        """The sum of the weights as a number, where all tokens have the same; else None."""
        return float(self.total.detach()) if self.weights.ndim == 1 else None

    @cached_property
    def point(self) -> Float[Tensor, "*batch head d_latent"]:
        """Where the weighted squared distance is least: c_w / s."""
        return self.pull / self.total

    @cached_property
    def least_of_point(self) -> float:
        """The least coordinate of that point."""
        return float(self.point.detach().min())

    @cached_property
    def pull(self) -> Float[Tensor, "*batch head d_latent"]:
        """Weighted sum of the centroids: of a single target, its centroid."""
        return einsum(self.weights, self.centroids, "... k, k head d -> ... head d")

    @cached_property
    def by_head(self) -> Float[Tensor, "head class d_latent"]:
        """The centroids, heads first and contiguous, as batched products want them."""
        return self.centroids.transpose(0, 1).contiguous()

    @cached_property
    def half_squares(self) -> Float[Tensor, "head class 1"]:
        """Half the squared norm of every centroid."""
        return self.by_head.square().sum(-1, keepdim=True) / 2

    @cached_property
    def wanted(self) -> Bool[Tensor, "*batch class"]:
        """The classes that are a success: those of positive weight.

        Where the weights only lead away, all classes that they do not lead away from.
        """
        towards = self.weights > 0
        return torch.where(towards.any(-1, keepdim=True), towards, self.weights == 0)

    def prepared(self) -> "Goal":
        """Compute at once all that follows from the goal, and return it: for many descents."""
        for name in _PREPARED:
            getattr(self, name)
        return self

    def with_weights(self, weights: Float[Tensor, "*batch class"]) -> "Goal":
        """Return the goal with other weights; what follows from the centroids is shared."""
        other = Goal(centroids=self.centroids, weights=weights, variances=self.variances)
        vars(other).update(by_head=self.by_head, half_squares=self.half_squares)
        return other

    def weighted(self, values: Float[Tensor, "*batch head class"]) -> Float[Tensor, "*batch head"]:
        """Return the weighted sum over the classes of values of each class."""
        return (values * self.weights[..., None, :]).sum(-1)


_PREPARED = (
    *("total", "shared_total", "pull", "point", "least_of_point", "by_head", "half_squares"),
    "wanted",
)


def weights_of(target: Target, classes: tuple[str, ...]) -> Float[Tensor, " class"]:
    """Return the weights of the classes that a target names.

    Args:
        target: a class, or weights of classes.
        classes: all classes, in their order.

    Raises:
        ValueError: a class that there is not, a weight that is not finite, or no weight but 0.
    """
    named: dict[str, float] = dict(target) if isinstance(target, Mapping) else {target: 1.0}
    for name, weight in named.items():
        if name not in classes:
            raise ValueError(f"no class {str(name)!r}: the classes are {list(classes)}")
        if not math.isfinite(weight):
            raise ValueError(f"the weight {weight} of {str(name)!r} is not allowed: give a number")
    if not any(named.values()):
        raise ValueError(
            f"target={named} wants nothing: give a class, or weights of which one is not 0"
        )
    return torch.tensor([float(named.get(name, 0.0)) for name in classes])


def target_name(target: Target) -> str:
    """Return how a target prints."""
    if isinstance(target, Mapping):
        return " ".join(f"{weight:+g} {name}" for name, weight in target.items())
    return str(target)
