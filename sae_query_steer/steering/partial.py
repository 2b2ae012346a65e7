"""A part of a steering intervention: only some latents of those that it moves."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.arguments import check_kind
from sae_query_steer.descent.control import LatentChoice
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.latent_descent import LatentDescent, LatentGradientSteerer
from sae_query_steer.steering.latent_moves import LatentMove
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads


@dataclass(frozen=True, eq=False)
class PartOfLatents(Edit):
    """The moves that a descent makes of some latents; the others stay where they were."""

    whole: LatentDescent
    """The descent."""

    latents: LatentChoice
    """Whose moves are kept."""

    @property
    def saes(self) -> Mapping[str, QueryEncoder]:
        """The encoders of the descent."""
        return self.whole.saes

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        return {**self.whole.labels, "method": "a part of latent gradient"}

    def to(self, device: str | torch.device) -> "PartOfLatents":
        """Return it with its SAEs on a device."""
        return replace(self, whole=self.whole.to(device))

    def change(
        self,
        activations: Float[Tensor, "token head d_head"],
        at: SiteHeads,
        tokens: TokenPositions,
        *,
        record: bool = False,
    ) -> QueryChange:
        """Return what the moves of the chosen latents add to queries; Args as `Edit.change`."""
        move = self.descended(activations, at, tokens)
        delta = self.decoded(activations, at, move)
        return move.described(delta) if record else QueryChange(delta=delta)

    def descended(
        self,
        queries: Float[Tensor, "token head d_head"],
        at: SiteHeads,
        tokens: TokenPositions,
    ) -> LatentMove:
        """Return where the chosen latents go; the others stay."""
        move = self.whole.descended(queries, at, tokens)
        chosen = self.latents(move.before, move.goal, at.hook_name, at.heads)
        return replace(move, after=torch.where(chosen, move.after, move.before))

    def decoded(self, queries: Tensor, at: SiteHeads, move: LatentMove) -> Tensor:
        """Return what a move of the latents adds to the queries, within the limits."""
        return self.whole.decoded(queries, at, move)


def partial_steerer(steerer: LatentGradientSteerer, *, latents: LatentChoice) -> Steerer:
    """Return a steerer that does to the chosen latents what another does to them, and no more.

    The other steerer's descent runs to its end with all of its latents; then the latents that are
    not chosen go back to where they were, and the rest is decoded. So the effect of a latent alone
    can be measured: nothing compensates for what is missing. `LatentGradientSteerer(latents=)`
    asks another question, how far a descent gets that may move only these. Under
    `SquaredDistance`, where latents are independent, the answers are the same. The other steerer's
    `max_relative_change` and `keep_norm` hold for the part.

    Args:
        steerer: the other steerer; this one acts at the same sites and tokens.
        latents: whose moves are kept, such as `GivenLatents`, or `ExceptLatents` for all but some.

    Raises:
        TypeError: another kind of steerer, or `latents` is no choice of latents.

    Source: our choice.
    """
    check_kind("steerer", steerer, LatentGradientSteerer, "other edits move no latents")
    if isinstance(latents, type) or not callable(latents):
        raise TypeError(f"latents must be a value, such as GivenLatents(...), got {latents!r}")
    return Steerer(PartOfLatents(steerer, latents), steerer.where, origin=steerer)
