"""What a steer is compared with, in the same form as the steer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.descent.objectives import CentroidContrast
from sae_query_steer.descent.places import TokenPlaces
from sae_query_steer.descent.strength import by_row, each
from sae_query_steer.sae.encoders import identity_encoders
from sae_query_steer.scopes.positions import LastPromptToken, Scope
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering.intervention import Steerer
from sae_query_steer.steering.steerer import LatentGradientSteerer
from sae_query_steer.steering.trace import QueryChange, SteeringTrace
from sae_query_steer.targets.centroids import CentroidTargets


def mean_difference(
    sites: Sequence[QuerySite],
    dense_targets: CentroidTargets,
    *,
    target: str,
    strength: float,
    scope: Scope | None = None,
    layers: Sequence[int] | None = None,
    heads: Any = None,
) -> LatentGradientSteerer:
    """Return a steerer that adds `strength` times the mean difference to the query.

    The difference is the target class's mean query minus the mean over the classes: one step of
    `CentroidContrast` over identity encoders, so everything but the SAE is the same mechanism.

    Args:
        sites: where, from `query_sites`.
        dense_targets: centroids made with `identity_encoders(sites)`.
        target: the class to steer towards.
        strength: 1 adds the whole difference.
        scope: where to steer; None means the last prompt token.
        layers: which layers; None means all.
        heads: which heads; None means all.

    Raises:
        ValueError: a strength that is negative or not finite, or centroids of other sites.

    Source: contrastive activation addition, at the query.
    """
    check_added(strength)
    return LatentGradientSteerer(
        identity_encoders(sites),
        dense_targets,
        target=target,
        objective=CentroidContrast(),
        n_steps=1,
        step_size=strength,
        scope=LastPromptToken() if scope is None else scope,
        layers=layers,
        heads=heads,
    )


def check_added(strength: float | Sequence[float]) -> None:
    """Raise unless a strength, or that of each row, can be used.

    Raises:
        ValueError: one is negative or not finite, or there are none.
    """
    for value in each(strength, "strength"):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"strength={value} is not allowed: give a finite number, 0 or more (to go the "
                "other way, steer towards another class)"
            )


def above_others(means: Float[Tensor, "class *shape"]) -> Float[Tensor, "class *shape"]:
    """Return each class's mean minus the mean of the other classes' means."""
    return (means - means.mean(0)) * (len(means) / (len(means) - 1))


def added(
    directions: Float[Tensor, "class *shape"],
    classes: Sequence[str],
    target: str | Sequence[str],
    strength: float | Sequence[float],
    places: TokenPlaces,
) -> Float[Tensor, "token *shape"]:
    """Return strength times the direction of the target class, for each token of some rows.

    Args:
        directions: one for each class.
        classes: their names.
        target: the class of all rows, or that of each.
        strength: of all rows, or of each.
        places: where the tokens stand.

    Raises:
        ValueError: there are not as many targets or strengths as rows.
    """
    n_tokens = len(places.row)
    targets = [target] * n_tokens if isinstance(target, str) else by_row("target", target, places)
    one = not isinstance(strength, Sequence)
    strengths = [strength] * n_tokens if one else by_row("strength", strength, places)
    chosen = directions[[list(classes).index(name) for name in targets]]
    factors = torch.tensor(strengths, dtype=chosen.dtype, device=chosen.device)
    return factors.reshape(-1, *[1] * (chosen.ndim - 1)) * chosen


@dataclass(frozen=True, eq=False)
class RandomDirectionSteerer(Steerer):
    """The control: at every token and head a random direction, as long as the steer's change.

    The direction is one for each site and head, drawn once from the seed; only its length follows
    the steerer, token by token.

    Source: our choice.
    """

    steerer: LatentGradientSteerer
    """The steerer whose change sets the length."""

    seed: int = 0
    """Of the directions."""

    scope: Scope = field(init=False, repr=False)
    """The steerer's."""

    sites: Mapping[str, QuerySite] = field(init=False, repr=False)
    """The steerer's."""

    site_heads: Mapping[str, tuple[int, ...]] = field(init=False, repr=False)
    """The steerer's."""

    def __post_init__(self) -> None:
        if not isinstance(self.steerer, LatentGradientSteerer):
            raise TypeError(
                f"steerer={type(self.steerer).__name__} is no steerer: give the "
                "LatentGradientSteerer that the control is for"
            )
        for name in ("scope", "sites", "site_heads"):
            object.__setattr__(self, name, getattr(self.steerer, name))

    def check_model(self, model: Any) -> None:
        """Raise unless the steerer belongs to this model."""
        self.steerer.check_model(model)

    def new_trace(self, model: Any, *, recording: bool) -> SteeringTrace:
        """Return an empty trace."""
        return replace(
            self.steerer.new_trace(model, recording=recording),
            method=f"random direction (seed {self.seed})",
        )

    def change(
        self,
        hook_name: str,
        queries: Float[Tensor, "token head d_head"],
        places: TokenPlaces,
        *,
        record: bool,
    ) -> QueryChange:
        """Return the random change of queries of the steered heads of a site."""
        length = self.steerer.change(hook_name, queries, places, record=False).delta.norm(
            dim=-1, keepdim=True
        )
        site = self.sites[hook_name]
        generator = torch.Generator().manual_seed(self.seed * 100_003 + site.layer)
        # Of all heads, so that a head's direction does not depend on which others are steered.
        direction = torch.randn(site.n_heads, site.d_head, generator=generator)
        direction = direction[list(self.site_heads[hook_name])]
        direction = direction / direction.norm(dim=-1, keepdim=True)
        delta = length * direction.to(length)
        if not record:
            return QueryChange(delta=delta)
        return self.steerer.described(hook_name, queries, delta, places)


def few_shot_prompt(
    prompt: str,
    examples: Sequence[LabelledExample],
    *,
    target: str,
    k: int,
    seed: int = 0,
    separator: str = "\n\n",
) -> str:
    """Return a prompt with k solved examples of the target class in front of it.

    Args:
        prompt: the prompt to answer.
        examples: labelled examples with responses; those equal to `prompt` are left out.
        target: the class whose examples are shown.
        k: how many, 1 or more.
        seed: of the choice, which does not depend on the global random state.
        separator: what stands between two examples, and before the prompt.

    Raises:
        ValueError: fewer than k examples of the class have a response.

    Source: arXiv 2502.18644 compares with few-shot prompting.
    """
    if k < 1:
        raise ValueError(f"k={k} is not allowed: give 1 or more examples")
    pool = [e for e in examples if e.label == target and e.response and e.prompt != prompt]
    if len(pool) < k:
        raise ValueError(
            f"class {target!r} has {len(pool)} examples with a response: k={k} are wanted; the "
            f"labels are {sorted({e.label for e in examples})}"
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:k]
    shots = [pool[i].prompt + pool[i].response for i in order.tolist()]
    return separator.join([*shots, prompt])
