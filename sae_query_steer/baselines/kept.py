"""A steer of queries that takes no attention from chosen tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sae_query_steer.arguments import check_kind
from sae_query_steer.descent.strength import Queries
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.keys import AttentionKeys
from sae_query_steer.steering.latent_descent import LatentDescent
from sae_query_steer.steering.look_at import Looks, LooksEdit
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads

N_STEPS, TOLERANCE = 20, 1e-3
"""Steps of the projection, and the loss in nats that may be left. Source: our choice."""


@dataclass(frozen=True, eq=False)
class KeptAttention(LooksEdit):
    """The change of another edit without what takes attention from some tokens."""

    other: Edit
    """The edit, of queries."""

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        labels = self.other.labels
        return {**labels, "method": f"{labels['method']}, attention kept"}

    def to(self, device: str | torch.device) -> "KeptAttention":
        """Return it with the weights of the other edit on a device."""
        return replace(self, other=self.other.to(device))

    def change(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        activations: Queries,
        at: SiteHeads,
        tokens: TokenPositions,
        *,
        record: bool = False,
        keys: AttentionKeys,
    ) -> QueryChange:
        """Return the change that is left; Args as `Edit.change`."""
        other, goal, linear = self.other, self._goal(keys), keys.linear
        if linear is None:
            raise ValueError(f"{at.hook_name} must have scores linear in its queries to keep them")
        given: dict[str, Any] = {"keys": keys} if other.needs_keys else {}
        made = other.change(activations, at, tokens, **given)
        delta = made.delta
        most, scores = goal.loss(linear.now), linear.now + linear.change(delta)
        for _ in range(N_STEPS):
            slope = linear.slope(goal.visible_gradient(scores))
            size = slope.square().sum(-1).clamp(min=torch.finfo(slope.dtype).tiny)
            over = (goal.loss(scores) - most).clamp(min=0)
            delta = delta - ((over / size)[..., None] * slope).to(delta)
            scores = linear.now + linear.change(delta)
        delta = torch.where((goal.loss(scores) <= most + TOLERANCE)[..., None], delta, 0.0)
        if record and isinstance(other, LatentDescent):
            return other.described(activations, at, tokens, delta)
        return replace(made, delta=delta)


def keep_attention(steerer: Steerer, look_at: Looks | list[Looks]) -> Steerer:
    """Return a steerer of queries without what takes attention from chosen tokens.

    At each token and head the change d becomes the end of d <- d - (L(d) - L(0)) g / ||g||², while
    L(d) > L(0), with L(d) = -sum_i w_i log(attention on source i) and g its gradient in the query.
    So the loss is at most 0.001 nats above what it is without this layer's change, whatever earlier
    layers changed. A change that does not raise it stays as it is; a head where 20 steps don't
    reach that is not steered.

    >>> keep_attention(LatentGradientSteerer(saes, targets, ...), LookAt("the passage"))

    Args:
        steerer: of queries, such as `LatentGradientSteerer` or `mean_difference`.
        look_at: the tokens, as of `AttentionSteerer`.

    Raises:
        TypeError: no steerer, or `look_at` holds something else than `LookAt`.
        ValueError: in a forward pass, scores that are not linear in the queries.

    Source: our choice, after SKOP (arXiv 2605.06342), of which the abstract was read. By others'
    accounts it projects out the main directions of differences between keys of focus and of tail
    tokens, which it takes from other texts, in some heads; here the keys are those of the token
    itself, and one direction is enough.
    """
    check_kind("steerer", steerer, Steerer, "give the steerer whose change is bounded")
    return Steerer(KeptAttention(look_at, steerer.edit), steerer.where, origin=steerer)
