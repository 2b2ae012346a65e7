"""`PartialSteerer`: of what a steer does to the latents, only a part reaches the query."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.descent.control import LatentChoice
from sae_query_steer.descent.places import TokenPlaces
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.scopes.positions import Scope
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering.intervention import Steerer
from sae_query_steer.steering.latent_moves import LatentMove
from sae_query_steer.steering.steerer import LatentGradientSteerer
from sae_query_steer.steering.trace import QueryChange, SteeringTrace


@dataclass(frozen=True, eq=False)
class PartialSteerer(Steerer):
    """Does to the chosen latents what another steerer does to them, and to the others nothing.

    The other steerer's descent runs to its end with all of its latents; then the latents that are
    not chosen go back to where they were, and the rest is decoded. So a latent's own part of a
    steer can be seen: nothing makes up for what is missing. `LatentGradientSteerer(latents=)`
    asks another question, where a descent gets to that may move only these. Under
    `SquaredDistance`, where no latent's way depends on another's, the answers are the same. The
    other steerer's `max_relative_change` and `keep_norm` hold for the part.

    Source: our choice.
    """

    steerer: LatentGradientSteerer
    """The other steerer; where it acts, this one does."""

    _: KW_ONLY

    latents: LatentChoice
    """Whose moves are kept, such as `GivenLatents`, or `ExceptLatents` for all but some."""

    scope: Scope = field(init=False, repr=False)
    """That of the other steerer."""

    sites: Mapping[str, QuerySite] = field(init=False, repr=False)
    """Those of the other steerer."""

    site_heads: Mapping[str, tuple[int, ...]] = field(init=False, repr=False)
    """Those of the other steerer."""

    def __post_init__(self) -> None:
        if not isinstance(self.steerer, LatentGradientSteerer):
            raise TypeError(
                f"steerer is a {type(self.steerer).__name__}: only a LatentGradientSteerer moves "
                "latents of which a part can be taken"
            )
        if isinstance(self.latents, type) or not callable(self.latents):
            raise TypeError(
                f"latents={self.latents!r} can't be called: give a value, such as GivenLatents"
            )
        for name in ("scope", "sites", "site_heads"):
            object.__setattr__(self, name, getattr(self.steerer, name))

    @property
    def saes(self) -> Mapping[str, QueryEncoder]:
        """The encoders of the other steerer."""
        return self.steerer.saes

    def check_model(self, model: Any) -> None:
        """Raise unless the steerer belongs to this model; a yes is remembered."""
        self.steerer.check_model(model)

    def to(self, device: str | torch.device) -> "PartialSteerer":
        """Return this steerer with its SAEs on a device."""
        return PartialSteerer(self.steerer.to(device), latents=self.latents)

    def new_trace(self, model: Any, *, recording: bool) -> SteeringTrace:
        """Return an empty trace that knows classes, target and tokenizer."""
        trace = self.steerer.new_trace(model, recording=recording)
        return replace(trace, method="a part of latent gradient")

    def change(
        self,
        hook_name: str,
        queries: Float[Tensor, "token head d_head"],
        places: TokenPlaces,
        *,
        record: bool,
    ) -> QueryChange:
        """Return what the moves of the chosen latents add to the queries."""
        move = self.descended(hook_name, queries, places)
        delta = self.decoded(hook_name, queries, move)
        return move.described(delta) if record else QueryChange(delta=delta)

    def descended(
        self, hook_name: str, queries: Float[Tensor, "token head d_head"], places: TokenPlaces
    ) -> LatentMove:
        """Return where the chosen latents go; the others stay."""
        move = self.steerer.descended(hook_name, queries, places)
        chosen = self.latents(move.before, move.goal, hook_name, self.site_heads[hook_name])
        return replace(move, after=torch.where(chosen, move.after, move.before))

    def decoded(self, hook_name: str, queries: Tensor, move: LatentMove) -> Tensor:
        """Return what a move of the latents adds to the queries, within the limits."""
        return self.steerer.decoded(hook_name, queries, move)
