"""Which latents may move, and which tokens and heads are steered at all."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_query_steer.descent.goals import Goal, Latents
from sae_query_steer.descent.objectives import posterior_of_target

Gate: TypeAlias = Callable[[Tensor, Goal], Tensor]
"""From latents [token head d_latent] and the goal to True where to steer, [token head]."""


@runtime_checkable
class LatentChoice(Protocol):
    """Which latents may move; a sparse choice is what makes a steer readable."""

    def __call__(self, z: Latents, goal: Goal, hook_name: str, heads: Sequence[int]) -> Tensor:
        """Return True where a latent may move, [token head d_latent] or [head d_latent]."""
        ...


@dataclass(frozen=True)
class ActiveLatents:
    """Only latents that fire at the token: the steer turns up and down what is there."""

    def __call__(
        self, z: Latents, goal: Goal, hook_name: str, heads: Sequence[int]
    ) -> Bool[Tensor, "*batch head d_latent"]:
        """Return where `z` is not zero."""
        del goal, hook_name, heads
        return z != 0


@dataclass(frozen=True)
class TopLatents:
    """The m latents of each head that tell the classes apart best.

    By the share of variance that the class explains, var_k(c_k) / (var_k(c_k) + mean_k(v_k)), with
    the classes weighed alike; a latent that never fires has none. Source: our choice.
    """

    m: int
    """How many of each head, 1 or more; a head of fewer latents gives all."""

    def __post_init__(self) -> None:
        if isinstance(self.m, bool) or not isinstance(self.m, int) or self.m < 1:
            raise ValueError(f"m={self.m!r} is not allowed: give a whole number, 1 or more")

    def __call__(
        self, z: Latents, goal: Goal, hook_name: str, heads: Sequence[int]
    ) -> Bool[Tensor, "head d_latent"]:
        """Return the best latents of each head."""
        del z, hook_name, heads
        share = discriminability(goal)
        best = share.topk(min(self.m, share.shape[-1]), dim=-1).indices
        return torch.zeros_like(share, dtype=torch.bool).scatter(-1, best, True)


@dataclass(frozen=True)
class GivenLatents:
    """The latents that you name."""

    latents: Mapping[str, Mapping[int, Sequence[int]]]
    """Latents by hook name and head; a head that is not named keeps all of its latents still."""

    def __post_init__(self) -> None:
        _check_named(self.latents)
        if not any(any(len(some) for some in heads.values()) for heads in self.latents.values()):
            raise ValueError("no latents are named: give {hook name: {head: [latent, ...]}}")

    def __call__(
        self, z: Latents, goal: Goal, hook_name: str, heads: Sequence[int]
    ) -> Bool[Tensor, "head d_latent"]:
        """Return the named ones.

        Raises:
            ValueError: a latent that there is not.
        """
        del goal
        return _named(self.latents, z, hook_name, heads)


@dataclass(frozen=True)
class ExceptLatents:
    """All latents but those that you name, which stay at the value that they have at the token.

    Where a steer works, holding what does the work should end it. Beware of two things. A latent
    that is held is not switched off: what fires for another class fires on. And other latents may
    make up for it: under `PrototypeLogLikelihood` the descent goes on, along what is left, until
    the posterior is there, and decoder rows overlap. `PartialSteerer` lets nothing make up for it.
    """

    latents: Mapping[str, Mapping[int, Sequence[int]]]
    """Latents by hook name and head, in the form that `GivenLatents` takes; of a head that is not
    named all latents may move."""

    def __post_init__(self) -> None:
        _check_named(self.latents)

    def __call__(
        self, z: Latents, goal: Goal, hook_name: str, heads: Sequence[int]
    ) -> Bool[Tensor, "head d_latent"]:
        """Return all but the named ones.

        Raises:
            ValueError: a latent that there is not.
        """
        del goal
        return ~_named(self.latents, z, hook_name, heads)


@dataclass(frozen=True)
class PosteriorBelow:
    """A gate: steer only where the target's posterior is below a value.

    Tokens that are on target already stay as they are.
    """

    value: float
    """Above 0, at most 1."""

    temperature: float = 1.0
    """Of the posterior, softmax_k(-1/2 ||z - c_k||^2 / T)."""

    def __post_init__(self) -> None:
        check_posterior("value", self.value)

    def __call__(self, z: Latents, goal: Goal) -> Bool[Tensor, "*batch head"]:
        """Return where to steer."""
        return posterior_of_target(z, goal, self.temperature) < self.value


@dataclass(frozen=True)
class LatentAbove:
    """A gate: steer only where a latent of the head is above a value."""

    latent: int
    """Its index, the same in every steered head."""

    value: float = 0.0
    """What it must exceed."""

    def __call__(self, z: Latents, goal: Goal) -> Bool[Tensor, "*batch head"]:
        """Return where to steer."""
        del goal
        return z[..., self.latent] > self.value


def _check_named(latents: Any) -> None:
    """Raise TypeError unless latents are named by hook name and head."""
    try:
        named = [operator.index(n) for by in latents.values() for h in by for n in (h, *by[h])]
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"latents={latents!r:.200} is not allowed: give {{hook name: {{head: [latent, ...]}}}}"
        ) from error
    del named


def _named(
    latents: Mapping[str, Mapping[int, Sequence[int]]],
    z: Latents,
    hook_name: str,
    heads: Sequence[int],
) -> Bool[Tensor, "head d_latent"]:
    chosen = torch.zeros(z.shape[-2:], dtype=torch.bool, device=z.device)
    for place, head in enumerate(heads):
        for latent in latents.get(hook_name, {}).get(head, ()):
            if not 0 <= latent < z.shape[-1]:
                raise ValueError(
                    f"no latent {latent} at {hook_name} head {head}: the latents are 0 to "
                    f"{z.shape[-1] - 1}"
                )
            chosen[place, latent] = True
    return chosen


def discriminability(goal: Goal) -> Float[Tensor, "head d_latent"]:
    """Return the share of each latent's variance that the class explains.

    Raises:
        ValueError: the goal has no variances.
    """
    if goal.variances is None:
        raise ValueError("TopLatents needs the variances of the classes: give Goal(variances=)")
    between = goal.centroids.var(0, correction=0)
    total = between + goal.variances.mean(0)
    return torch.where(total > 0, between / total, 0.0)


def opened(gate: Gate, z: Latents, goal: Goal) -> Bool[Tensor, "*batch head"]:
    """Return where a gate steers.

    Raises:
        TypeError: it gave something else than a boolean for each token and head.
    """
    where = gate(z, goal)
    if not isinstance(where, Tensor) or where.dtype != torch.bool or where.shape != z.shape[:-1]:
        given = f"{where.dtype} {list(where.shape)}" if isinstance(where, Tensor) else f"{where!r}"
        raise TypeError(
            f"the gate {gate!r} gave {given}: it must give a boolean tensor {list(z.shape[:-1])}, "
            "one for each token and head"
        )
    return where


def check_posterior(name: str, value: float | None) -> None:
    """Raise ValueError unless a probability is above 0 and at most 1, or None."""
    if value is not None and not (math.isfinite(value) and 0 < value <= 1):
        raise ValueError(f"{name}={value} is not allowed: give more than 0, at most 1")
