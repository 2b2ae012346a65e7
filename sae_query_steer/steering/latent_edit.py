"""Edits of chosen latents: set by hand, or only they of those that a descent moves."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from sae_query_steer.arguments import check_kind, check_name, check_number
from sae_query_steer.descent.control import LatentChoice
from sae_query_steer.descent.strength import Queries
from sae_query_steer.sae.encoders import QueryEncoder, decoded_difference, encoder_sites, in_32_bits
from sae_query_steer.scopes.positions import Scope, TokenPositions
from sae_query_steer.steering.edit import LatentsEdit, most_moved
from sae_query_steer.steering.latent_descent import LatentDescent, LatentGradientSteerer, LatentMove
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads, Where

How = Literal["set", "add", "scale", "clamp"]
"""What is done with a latent: set to a value, a number added, scaled by a factor (0 removes it), or
kept between a pair of values."""

_CHANGES: dict[How, Callable[[Tensor, Tensor], Tensor]] = {
    "set": lambda z, values: values.expand_as(z),
    "add": torch.add,
    "scale": torch.mul,
    "clamp": lambda z, bounds: z.clamp(bounds[:, 0], bounds[:, 1]),
}

LatentValues = Mapping[str, Mapping[int, Mapping[int, float | tuple[float, float]]]]
"""By hook name, head and latent: the value, or for "clamp" the smallest and the largest."""


@dataclass(frozen=True, eq=False)
class LatentEdit(LatentsEdit):
    """Changes latents by hand: adds decode(z') - decode(z), where z' is z with the named changes.

    The SAE's reconstruction error stays in the query, so an edit that changes no latent is exactly
    the identity.
    """

    latents: LatentValues
    """What to do with which latents."""

    how: How = "set"
    """How."""

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        return {"method": f"latents by hand ({self.how})"}

    def change(
        self, activations: Queries, at: SiteHeads, tokens: TokenPositions, *, record: bool = False
    ) -> QueryChange:
        """Return what the changes of the latents add to queries; Args as `Edit.change`."""
        del tokens
        encoder = self._encoder(at, activations.device)
        before = encoder.encode(in_32_bits(activations))
        after = before.clone()
        for place, head in enumerate(at.heads):
            values = self.latents[at.hook_name][head]
            index = torch.tensor([*values], device=before.device)
            given = torch.tensor([*values.values()]).to(before)
            after[:, place, index] = _CHANGES[self.how](before[:, place, index], given)
        if self.how != "set" and encoder.latent_min is not None:
            after = after.clamp(min=encoder.latent_min)
        delta = decoded_difference(encoder, after, before)
        return QueryChange(delta=delta, **(most_moved(before, after) if record else {}))


def edit_latents(
    saes: Mapping[str, QueryEncoder], latents: LatentValues, *, how: How = "set", scope: Scope
) -> Steerer:
    """Return a steerer that changes named latents of named heads by hand.

    >>> edit_latents(saes, {"blocks.1.attn.hook_q": {0: {17: 3.0}}}, scope=EveryPosition())

    Args:
        saes: the SAEs by hook name.
        latents: by hook name, head and latent the value, in units of the latent; for `how="clamp"`
            a pair of values.
        how: "set" to the value; "add" it; "scale" by it, where 0 removes the latent; or "clamp"
            between the two.
        scope: the tokens at which latents are changed.

    Raises:
        ValueError: a hook name, head or latent that there is not, a value that is not finite, one
            below the smallest that the SAE can have, or a pair in the wrong order.

    Source: our choice.
    """
    if how not in get_args(How):
        raise ValueError(f"how must be one of {get_args(How)}, got {how!r}")
    for name, heads in latents.items():
        check_name("hook name", name, saes)
        encoder = saes[name]
        for head, values in heads.items():
            check_number(f"a head at {name}", head, whole=True, least=0, most=encoder.n_heads - 1)
            if not values:
                raise ValueError(f"latents must name at least one latent at {name}, head {head}")
            for latent, value in values.items():
                _check(f"{name}, head {head}", encoder, latent, value, how)
    kept = {name: saes[name] for name in latents}
    sites = encoder_sites(kept)
    heads = {sites[name].layer: sorted(heads) for name, heads in latents.items()}
    where = Where(sites.values(), scope=scope, heads=heads)
    return Steerer(LatentEdit(kept, latents, how), where)


def _check(place: str, encoder: QueryEncoder, latent: int, value: Any, how: How) -> None:
    most = encoder.d_latent - 1
    check_number(f"a latent at {place}", latent, whole=True, least=0, most=most)
    name = f"the value of latent {latent} at {place}"
    if how != "clamp":
        check_number(name, value, least=encoder.latent_min if how == "set" else None)
    elif not isinstance(value, tuple) or len(value) != 2 or not value[0] <= value[1]:
        raise ValueError(f"{name} must be a pair (smallest, largest), got {value!r}")


@dataclass(frozen=True, eq=False)
class PartOfLatents(LatentDescent):
    """The moves that a descent makes of some latents; the others stay where they were."""

    _: KW_ONLY

    kept: LatentChoice
    """Whose moves are kept."""

    has_target: ClassVar[bool] = False

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        return {**super().labels, "method": "a part of latent gradient"}

    def descended(
        self, queries: Queries, at: SiteHeads, tokens: TokenPositions, *, record: bool = False
    ) -> LatentMove:
        """Return where the chosen latents go; the others stay. The loss is not recorded."""
        del record
        move = super().descended(queries, at, tokens)
        chosen = self.kept(move.before, move.goal, at.hook_name, at.heads)
        return move._replace(after=torch.where(chosen, move.after, move.before))


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
    part = PartOfLatents(**steerer.settings, kept=latents)
    return Steerer(part, steerer.where, origin=steerer)
