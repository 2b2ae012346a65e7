"""Control of a descent: bounds, latents that may move, gates and schedules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.descent.goals import Goal, Latents
from sae_query_steer.descent.objectives import posterior_of_target
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.positions import check_result

Gate: TypeAlias = Callable[[Tensor, Goal], Tensor]
"""From latents [token head d_latent] and the goal to True where to steer, [token head]."""

Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""From the age of tokens (0 in the prompt, 1 for the first generated one, ...) to the factors,
0 or more, by which their step size is multiplied."""

LatentChoice: TypeAlias = Callable[[Tensor, Goal, str, Sequence[int]], Tensor]
"""From latents [token head d_latent], the goal, the hook name and the steered heads to True where a
latent may move, [token head d_latent] or [head d_latent]."""

LatentsByHead: TypeAlias = Mapping[str, Mapping[int, Sequence[int]]]
"""Indices of latents by hook name and head."""

ByHead = Bool[Tensor, "head d_latent"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """Constraints of a descent."""

    lower: float | None = 0.0
    """Smallest value of a latent (0 for ReLU and TopK latents); None means no projection."""

    movable: Bool[Tensor, "..."] | None = None
    """Latents that may move, [*batch head d_latent] or [head d_latent]; None means all."""

    radius: float | None = None
    """Trust region: largest ||z - z_0|| of a row and head, in units of the latents."""

    until: float | None = None
    """A row and head stops once `objectives.posterior_of_target` reaches this value."""

    temperature: float = 1.0
    """T of that posterior, softmax_k(-1/2 ||z - c_k||^2 / T)."""


@dataclass(frozen=True)
class ActiveLatents:
    """Only latents that are active at the token may move."""

    def __call__(
        self, z: Latents, goal: Goal, hook_name: str, heads: Sequence[int]
    ) -> Bool[Tensor, "*batch head d_latent"]:
        """Return where `z` is not zero."""
        return z != 0


@dataclass(frozen=True)
class TargetLatents:
    """Only latents that are not 0 in the target may move: a sparse target makes a sparse change."""

    def __call__(
        self, z: Latents, goal: Goal, hook_name: str, heads: Sequence[int]
    ) -> Bool[Tensor, "*batch head d_latent"]:
        """Return where the weighted sum of the targets is not zero."""
        return (goal.pull != 0).expand_as(z)


@dataclass(frozen=True)
class TopLatents:
    """Only the m latents of each head that discriminate best between the classes may move.

    Ranked by the share of variance explained by the class, var_k(c_k) / (var_k(c_k) + mean_k(v_k)),
    with equal weight on every class; 0 for a latent that never fires. Source: our choice.
    """

    m: int
    """Number of latents of each head, 1 or more; heads with fewer latents use all."""

    def __post_init__(self) -> None:
        check_number("m", self.m, whole=True, least=1)

    def __call__(self, z: Latents, goal: Goal, hook_name: str, heads: Sequence[int]) -> ByHead:
        """Return the best latents of each head.

        Raises:
            ValueError: the goal has no variances.
        """
        between = goal.centroids.var(0, correction=0)
        total = between + goal.known_variances.mean(0)
        share = torch.where(total > 0, between / total, 0.0)
        best = share.topk(min(self.m, share.shape[-1]), dim=-1).indices
        return torch.zeros_like(share, dtype=torch.bool).scatter(-1, best, True)


@dataclass(frozen=True)
class _NamedLatents:
    latents: LatentsByHead
    """Latents by hook name and head."""

    def __post_init__(self) -> None:
        for heads in self.latents.values():
            for head, indices in heads.items():
                for number in (head, *indices):
                    check_number("heads and latents", number, whole=True, least=0)

    def _mask(self, z: Latents, hook_name: str, heads: Sequence[int]) -> ByHead:
        named = torch.zeros(z.shape[-2:], dtype=torch.bool, device=z.device)
        for place, head in enumerate(heads):
            for latent in self.latents.get(hook_name, {}).get(head, ()):
                name = f"a latent at {hook_name} head {head}"
                check_number(name, latent, whole=True, least=0, most=z.shape[-1] - 1)
                named[place, latent] = True
        return named


@dataclass(frozen=True)
class GivenLatents(_NamedLatents):
    """Only the given latents may move, by hook name and head; none of any other head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(any(len(some) for some in heads.values()) for heads in self.latents.values()):
            raise ValueError("latents must name at least one latent: {hook name: {head: [0, ...]}}")

    def __call__(self, z: Latents, goal: Goal, hook_name: str, heads: Sequence[int]) -> ByHead:
        """Return the given latents.

        Raises:
            ValueError: a latent that does not exist.
        """
        return self._mask(z, hook_name, heads)


@dataclass(frozen=True)
class ExceptLatents(_NamedLatents):
    """All latents except the given ones may move; those keep the value they have at the token.

    For ablations. A latent that is held is not switched off, and other latents may compensate:
    under `PrototypeLogLikelihood` the descent continues along the others until the posterior is
    reached, and decoder rows overlap. `partial_steerer` rules out such compensation.
    """

    def __call__(self, z: Latents, goal: Goal, hook_name: str, heads: Sequence[int]) -> ByHead:
        """Return all latents except the given ones; all of any other head.

        Raises:
            ValueError: a latent that does not exist.
        """
        return ~self._mask(z, hook_name, heads)


@dataclass(frozen=True)
class PosteriorBelow:
    """A gate: steer only where the posterior of the target is below a value."""

    value: float
    """Above 0, at most 1."""

    temperature: float = 1.0
    """T of the posterior, softmax_k(-1/2 ||z - c_k||^2 / T)."""

    def __post_init__(self) -> None:
        check_number("value", self.value, above=0, most=1)

    def __call__(self, z: Latents, goal: Goal) -> Bool[Tensor, "*batch head"]:
        """Return where to steer."""
        return posterior_of_target(z, goal, self.temperature) < self.value


@dataclass(frozen=True)
class LatentAbove:
    """A gate: steer only where a latent of the head exceeds a value."""

    latent: int
    """Its index, the same in every steered head."""

    value: float = 0.0
    """Threshold, exclusive."""

    def __call__(self, z: Latents, goal: Goal) -> Bool[Tensor, "*batch head"]:
        """Return where to steer."""
        return z[..., self.latent] > self.value


@dataclass(frozen=True)
class ExponentialDecay:
    """A schedule: the factor 2^(-age / half_life), 1 up to the end of the prompt."""

    half_life: float
    """Generated tokens after which the factor is one half, above 0."""

    def __post_init__(self) -> None:
        check_number("half_life", self.half_life, above=0)

    def __call__(self, age: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
        """Return the factors."""
        return torch.exp2(-age / self.half_life)


@dataclass(frozen=True)
class LinearWarmUp:
    """A schedule: the factor min(1, age / n), 0 in the prompt, 1 from generated token n on."""

    n: int
    """Generated tokens until the factor is 1, above 0."""

    def __post_init__(self) -> None:
        check_number("n", self.n, above=0)

    def __call__(self, age: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
        """Return the factors."""
        return (age / self.n).clamp(max=1)


def opened(gate: Gate, z: Latents, goal: Goal) -> Bool[Tensor, "*batch head"]:
    """Return where a gate allows steering.

    Raises:
        ValueError: the gate does not return a boolean for each token and head.
    """
    return check_result(
        gate(z, goal), z.shape[:-1], f"what the gate {scope_name(gate)} returns", torch.bool
    )
