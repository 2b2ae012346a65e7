"""Edits by hand: named latents of named heads are set, added to, scaled or clamped."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.arguments import check_name, check_number
from sae_query_steer.sae.encoders import (
    QueryEncoder,
    at_heads,
    decoded_difference,
    encoder_sites,
    in_32_bits,
)
from sae_query_steer.scopes.positions import Scope, TokenPositions
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.latent_moves import most_moved
from sae_query_steer.steering.origin import encoders_on
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads, Where

How = Literal["set", "add", "scale", "clamp"]
"""What is done with a latent: set to a value, a number added, scaled by a factor (0 removes it), or
kept between a pair of values."""

LatentValues = Mapping[str, Mapping[int, Mapping[int, float | tuple[float, float]]]]
"""By hook name, head and latent: the value, or for "clamp" the smallest and the largest."""


@dataclass(frozen=True, eq=False)
class LatentEdit(Edit):
    """Changes latents by hand: adds decode(z') - decode(z), where z' is z with the named changes.

    The SAE's reconstruction error stays in the query, so an edit that changes no latent is exactly
    the identity.
    """

    saes: Mapping[str, QueryEncoder]
    """Encoders by hook name."""

    latents: LatentValues
    """What to do with which latents."""

    how: How = "set"
    """How."""

    _made: dict[Any, QueryEncoder] = field(init=False, repr=False, default_factory=dict)

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        return {"method": f"latents by hand ({self.how})"}

    def to(self, device: str | torch.device) -> "LatentEdit":
        """Return it with its SAEs on a device."""
        return replace(self, saes=encoders_on(self.saes, device))

    def change(
        self,
        activations: Float[Tensor, "token head d_head"],
        at: SiteHeads,
        tokens: TokenPositions,
        *,
        record: bool = False,
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
            after[:, place, index] = self._changed(before[:, place, index], given)
        if self.how != "set" and encoder.latent_min is not None:
            after = after.clamp(min=encoder.latent_min)
        delta = decoded_difference(encoder, after, before)
        return QueryChange(delta=delta, **(most_moved(before, after) if record else {}))

    def _changed(self, z: Tensor, given: Tensor) -> Tensor:
        match self.how:
            case "set":
                return given.expand_as(z)
            case "add":
                return z + given
            case "scale":
                return z * given
            case "clamp":
                return z.clamp(given[:, 0], given[:, 1])

    def _encoder(self, at: SiteHeads, device: torch.device) -> QueryEncoder:
        key = (at.hook_name, at.heads, device)
        if key not in self._made:
            self._made[key] = at_heads(self.saes[at.hook_name], at.heads, device)
        return self._made[key]


def edit_latents(
    saes: Mapping[str, QueryEncoder],
    latents: LatentValues,
    *,
    how: How = "set",
    scope: Scope,
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
