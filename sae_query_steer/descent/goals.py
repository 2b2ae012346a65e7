"""The goal of a descent: the centroid of each class, and a weight for each class."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from sae_query_steer.arguments import check_name, check_number

Latents = Float[Tensor, "*batch head d_latent"]
"""Latents of some heads of a site."""

Centroids = Float[Tensor, "class head d_latent"]
"""Mean or variance of every latent, by class and head."""

Target = str | Mapping[str, float | int]
"""A class, or class weights such as {"apply": 1, "create": -0.5}: negative ones steer away."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Goal:
    """The class centroids of one site and the weight of each class.

    A single target has weight 1 on its class. Weights need not sum to 1: a negative weight steers
    away from a class, and weights that sum to 0 steer along a difference of classes.
    """

    centroids: Centroids
    """Mean latent of each class."""

    weights: Float[Tensor, "*batch class"]
    """Weight of each class: [class] for all tokens, or one row per token."""

    variances: Centroids | None = None
    """Variance of each latent within its class; required by some objectives."""

    @classmethod
    def towards(
        cls, centroids: Centroids, target: int, variances: Centroids | None = None
    ) -> "Goal":
        """Return the goal of a single class, by its index."""
        weights = torch.eye(len(centroids), dtype=centroids.dtype, device=centroids.device)[target]
        return cls(centroids=centroids, weights=weights, variances=variances)

    @property
    def known_variances(self) -> Centroids:
        """`variances`, or a ValueError without any."""
        if self.variances is None:
            raise ValueError("this objective or choice of latents needs Goal(variances=...)")
        return self.variances

    @cached_property
    def total(self) -> Float[Tensor, "*batch 1 1"]:
        """Sum of the weights, broadcastable to latents."""
        return self.weights.sum(-1)[..., None, None]

    @cached_property
    def shared_total(self) -> float | None:
        """The sum of the weights as a number if all tokens share them, otherwise None."""
        return float(self.total.detach()) if self.weights.ndim == 1 else None

    @cached_property
    def pull(self) -> Latents:
        """Weighted sum of the centroids; for a single target, its centroid."""
        return einsum(self.weights, self.centroids, "... k, k head d -> ... head d")

    @cached_property
    def point(self) -> Latents:
        """Minimum of the weighted squared distance: `pull / total`."""
        return self.pull / self.total

    @cached_property
    def least_of_point(self) -> float:
        """Smallest coordinate of `point`."""
        return float(self.point.detach().min())

    @cached_property
    def by_head(self) -> Float[Tensor, "head class d_latent"]:
        """The centroids, heads first and contiguous, for batched products."""
        return self.centroids.transpose(0, 1).contiguous()

    @cached_property
    def half_squares(self) -> Float[Tensor, "head class 1"]:
        """Half the squared norm of every centroid."""
        return self.by_head.square().sum(-1, keepdim=True) / 2

    @cached_property
    def wanted(self) -> Bool[Tensor, "*batch class"]:
        """Classes of positive weight; if no weight is positive, those of weight 0."""
        positive = self.weights > 0
        return torch.where(positive.any(-1, keepdim=True), positive, self.weights == 0)

    def prepared(self) -> "Goal":
        """Return this goal with its derived values computed, for use in many descents."""
        for name, value in vars(Goal).items():
            if isinstance(value, cached_property):
                getattr(self, name)
        return self

    def with_weights(self, weights: Float[Tensor, "*batch class"]) -> "Goal":
        """Return the goal with other weights; values derived from the centroids are shared."""
        other = Goal(centroids=self.centroids, weights=weights, variances=self.variances)
        vars(other).update(by_head=self.by_head, half_squares=self.half_squares)
        return other

    def weighted(self, values: Float[Tensor, "*batch head class"]) -> Float[Tensor, "*batch head"]:
        """Return the weighted sum over the classes."""
        return (values * self.weights[..., None, :]).sum(-1)


def weights_of(target: Target, classes: tuple[str, ...]) -> Float[Tensor, " class"]:
    """Return the weight of each class, in the order of `classes`.

    Raises:
        ValueError: the target has an unknown class, a weight that is not finite, or only weights
            of 0.
    """
    named: dict[str, float] = dict(target) if isinstance(target, Mapping) else {target: 1.0}
    for name, weight in named.items():
        check_name("class", name, classes)
        check_number(f"the weight of {str(name)!r}", weight)
    if not any(named.values()):
        raise ValueError(f"target must have a weight other than 0, got {named}")
    return torch.tensor([float(named.get(name, 0.0)) for name in classes])


def target_name(target: Target) -> str:
    """Return the display name of a target."""
    if isinstance(target, Mapping):
        return " ".join(f"{weight:+g} {name}" for name, weight in target.items())
    return str(target)
