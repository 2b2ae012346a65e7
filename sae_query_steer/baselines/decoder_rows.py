"""A steer without a descent: add the decoder rows of the latents that mark a class."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.baselines.simple import above_others, added, check_added
from sae_query_steer.descent.objectives import CentroidContrast
from sae_query_steer.descent.places import TokenPlaces
from sae_query_steer.descent.strength import each
from sae_query_steer.sae.encoders import QueryEncoder, device_of, in_32_bits, on_device
from sae_query_steer.scopes.positions import LastPromptToken, Scope
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering.intervention import Steerer
from sae_query_steer.steering.steerer import LatentGradientSteerer
from sae_query_steer.steering.trace import QueryChange, SteeringTrace
from sae_query_steer.targets.centroids import CentroidTargets


@dataclass(frozen=True, eq=False)
class DecoderRowsSteerer(Steerer):
    """Adds SAE decoder rows of a class's top latents to the query, whatever the query is.

    Of each head the m latents count whose mean in the target class lies furthest above the mean of
    the other classes' means, in units of the latent's standard deviation; a head in which fewer
    lie above takes these. To the query is added strength * sum_i (mean_target - mean_others)_i *
    W_dec_i over them. At strength 1 this is what the mean latents of the class decode to beyond
    those of the others, as far as the m latents tell; with an identity encoder and m = d_head, the
    rising half of the mean difference. Nothing is encoded, and the SAE's error never enters.

    Source: our choice, after the usual way to steer by an SAE, adding a feature's decoder row. The
    rows are weighted by the difference and the sum is not normalised, so that a head whose latents
    hardly know the class is hardly moved, and strength means the same in every head.
    """

    saes: Mapping[str, QueryEncoder]
    """Encoders by hook name; those of the layers that are steered."""

    targets: CentroidTargets
    """The centroids that were made with these encoders on this model."""

    _: KW_ONLY

    target: str | Sequence[str]
    """The class to steer towards; a list has one for each row of the batch."""

    strength: float | Sequence[float]
    """Factor of what is added, 0 or more; a list likewise."""

    m: int = 4
    """Latents of each head, 1 or more; a head of fewer latents gives all that rise."""

    scope: Scope = field(default_factory=LastPromptToken)
    """Where to steer."""

    layers: Sequence[int] | None = None
    """Which layers; None means all that have an SAE."""

    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None
    """Which heads: the same in every layer, or by layer; None means all."""

    sites: Mapping[str, QuerySite] = field(init=False, repr=False)
    """The site of every encoder, by hook name."""

    site_heads: Mapping[str, tuple[int, ...]] = field(init=False, repr=False)
    """The heads that are steered, by hook name."""

    _still: LatentGradientSteerer = field(init=False, repr=False)
    """A steerer that never moves: it knows sites, checks and the terms of a trace."""

    _directions: Mapping[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_added(self.strength)
        if isinstance(self.m, bool) or not isinstance(self.m, int) or self.m < 1:
            raise ValueError(f"m={self.m!r} is not allowed: give a whole number, 1 or more")
        for target in each(self.target, "target"):
            self.targets.class_index(target)
        still = LatentGradientSteerer(
            self.saes,
            self.targets,
            target=self.target,
            objective=CentroidContrast(),
            n_steps=0,
            step_size=0.0,
            scope=self.scope,
            layers=self.layers,
            heads=self.heads,
        )
        object.__setattr__(self, "_still", still)
        for name in ("sites", "site_heads"):
            object.__setattr__(self, name, getattr(still, name))
        directions = {name: self._direction(name) for name in self.site_heads}
        object.__setattr__(self, "_directions", directions)

    def check_model(self, model: Any) -> None:
        """Raise unless the steerer belongs to this model; a yes is remembered."""
        self._still.check_model(model)

    def to(self, device: str | torch.device) -> "DecoderRowsSteerer":
        """Return this steerer with its SAEs on a device; what is not there already is copied."""
        saes = {name: on_device(encoder, device) for name, encoder in self.saes.items()}
        return replace(self, saes=saes)

    def new_trace(self, model: Any, *, recording: bool) -> SteeringTrace:
        """Return an empty trace that knows classes, target and tokenizer."""
        return replace(
            self._still.new_trace(model, recording=recording),
            method=f"decoder rows (m={self.m})",
        )

    def latents(self, target: str) -> dict[str, dict[int, list[int]]]:
        """Return the latents of a class by hook name and head, those that mark it most first.

        In the form that `GivenLatents` takes.

        Raises:
            ValueError: no such class.
        """
        index, chosen = self.targets.class_index(target), {}
        for name, heads in self.site_heads.items():
            marks = _marks(self.targets, name)[index]
            best = _best(marks, self.m)
            chosen[name] = {h: [i for i in best[h].tolist() if marks[h, i] > 0] for h in heads}
        return chosen

    def change(
        self,
        hook_name: str,
        queries: Float[Tensor, "token head d_head"],
        places: TokenPlaces,
        *,
        record: bool,
    ) -> QueryChange:
        """Return what is added to the queries of the steered heads of a site."""
        queries = in_32_bits(queries)
        directions = self._directions[hook_name].to(queries)
        delta = added(directions, self.targets.classes, self.target, self.strength, places)
        if not record:
            return QueryChange(delta=delta)
        return self._still.described(hook_name, queries, delta, places)

    @torch.no_grad()
    def _direction(self, hook_name: str) -> Float[Tensor, "class head d_head"]:
        """Return what is added at strength 1, of the steered heads."""
        encoder, marks = self.saes[hook_name], _marks(self.targets, hook_name)
        best = torch.zeros_like(marks, dtype=torch.bool).scatter(-1, _best(marks, self.m), True)
        rise = above_others(self.targets.means[hook_name])
        weights = torch.where(best & (marks > 0), rise, 0.0)
        weights = weights.to(device_of(encoder) or weights.device)
        # The difference of two decodings: the rows as the encoder reads them, without its bias.
        direction = encoder.decode(weights) - encoder.decode(torch.zeros_like(weights))
        return direction[:, list(self.site_heads[hook_name])]


def _marks(targets: CentroidTargets, hook_name: str) -> Float[Tensor, "class head d_latent"]:
    """Return how far the class's mean of a latent lies above the others', in its deviations.

    The classes are weighed alike; a latent that never fires marks none.
    """
    means, variances = targets.means[hook_name], targets.variances[hook_name]
    total = means.var(0, correction=0) + variances.mean(0)
    return torch.where(total > 0, above_others(means) / total.sqrt(), 0.0)


def _best(marks: Float[Tensor, "*any d_latent"], m: int) -> Int[Tensor, "*any m"]:
    return marks.argsort(dim=-1, descending=True, stable=True)[..., :m]
