"""`LatentGradientSteerer`: move the latent of the current query towards a class, and decode."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from sae_query_steer.centroids import CentroidTargets
from sae_query_steer.descent import check_strength, descend
from sae_query_steer.intervention import Steerer, chosen_heads
from sae_query_steer.objectives import Objective, squared_distances
from sae_query_steer.positions import LastPromptToken, Scope, check_scope
from sae_query_steer.sae.encoders import QueryEncoder, encoder_sites
from sae_query_steer.sites import QuerySite
from sae_query_steer.targets import check_belongs
from sae_query_steer.trace import QueryChange, SteeringTrace


@dataclass(frozen=True, eq=False)
class LatentGradientSteerer(Steerer):
    """Steers by gradient descent on sparse features of attention queries.

    At every scoped position, for every chosen head: z0 = encode(q), K projected gradient steps on
    the objective lead to zK, and the query becomes q + decode(zK) - decode(z0). The SAE's
    reconstruction error never enters the model: zero steps, or a step size of zero, is exactly
    the identity. Over `identity_encoders` the same value is dense query steering.

    Source: arXiv 2502.18644; writing the difference of two decodings, not the reconstruction, is
    our choice, so that steering is not confounded with the SAE's error.
    """

    saes: Mapping[str, QueryEncoder]
    """Encoders by hook name; those of the layers that are steered."""

    targets: CentroidTargets
    """The centroids that were made with these encoders on this model."""

    _: KW_ONLY

    target: str
    """The class to steer towards."""

    objective: Objective
    """What is minimised: `PrototypeLogLikelihood`, `SquaredDistance` or `CentroidContrast`."""

    n_steps: int
    """Gradient steps at each position, 0 or more."""

    step_size: float
    """Size of a step, 0 or more, in units of the objective's gradient."""

    scope: Scope = field(default_factory=LastPromptToken)
    """Where to steer. A steer that is clean at the last prompt token breaks the text elsewhere."""

    layers: Sequence[int] | None = None
    """Which layers; None means all that have an SAE."""

    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None
    """Which heads: the same in every layer, or by layer; None means all."""

    sites: Mapping[str, QuerySite] = field(init=False, repr=False)
    """The site of every encoder, by hook name."""

    site_heads: Mapping[str, tuple[int, ...]] = field(init=False, repr=False)
    """The heads that are steered, by hook name."""

    _verified: WeakSet[Any] = field(init=False, repr=False, default_factory=WeakSet)

    def __post_init__(self) -> None:
        check_strength(self.n_steps, self.step_size)
        check_scope(self.scope, name="scope", generating=True)
        if isinstance(self.objective, type) or not isinstance(self.objective, Objective):
            raise TypeError(
                f"objective={self.objective!r} is no objective; allowed: SquaredDistance(), "
                "PrototypeLogLikelihood(), CentroidContrast(), or a value with loss and gradient"
            )
        self.targets.class_index(self.target)
        sites = encoder_sites(self.saes)
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "site_heads", chosen_heads(sites, self.layers, self.heads))
        for name in self.site_heads:
            if name not in self.targets.means:
                raise ValueError(
                    f"no centroids at {name}: there are some at {list(self.targets.means)}; build "
                    "them with the same SAEs"
                )
            sae = self.saes[name]
            have, want = tuple(self.targets.means[name].shape[1:]), (sae.n_heads, sae.d_latent)
            if have != want:
                raise ValueError(
                    f"centroids of another SAE at {name}: they are for {have[0]} heads of "
                    f"{have[1]} latents, the SAE has {want[0]} heads of {want[1]}"
                )

    def check_model(self, model: Any) -> None:
        """Raise unless the steerer belongs to this model; a yes is remembered.

        A model whose weights are changed in place afterwards is not looked at again.

        Raises:
            ValueError: the model has no such site, other queries than the fingerprint's, or lies
                on another device than the SAEs.
        """
        if model in self._verified:
            return
        for name in self.site_heads:
            self.sites[name].check(model)
        steered = {name: self.saes[name] for name in self.site_heads}
        check_belongs(model, steered, self.targets)
        self._verified.add(model)

    def new_trace(self, model: Any, *, recording: bool) -> SteeringTrace:
        """Return an empty trace that knows classes, target and tokenizer."""
        return SteeringTrace(
            recording=recording,
            classes=self.targets.classes,
            target=str(self.target),
            tokenizer=model.tokenizer,
        )

    def change(self, hook_name: str, queries: Tensor, *, record: bool) -> QueryChange:
        """Return what the descent adds to queries [token head d_head] of all heads of a site."""
        sae = self.saes[hook_name]
        z0 = sae.encode(queries)
        centroids = self.targets.means[hook_name].to(device=z0.device, dtype=z0.dtype)
        result = descend(
            z0,
            centroids,
            self.targets.class_index(self.target),
            self.objective,
            n_steps=self.n_steps,
            step_size=self.step_size,
            lower=sae.latent_min,
            record_loss=record,
        )
        delta = sae.decode(result.z) - sae.decode(z0)
        if not record:
            return QueryChange(delta=delta)
        return self._described(delta, z0, result.z, centroids, result.loss)

    def described(self, hook_name: str, queries: Tensor, delta: Tensor) -> QueryChange:
        """Return a change that something else made, with what it does in this steerer's terms.

        The latents afterwards are those of the changed query.
        """
        sae, target = self.saes[hook_name], self.targets.class_index(self.target)
        before, after = sae.encode(queries), sae.encode(queries + delta.to(queries.dtype))
        centroids = self.targets.means[hook_name].to(device=before.device, dtype=before.dtype)
        loss = torch.stack([self.objective.loss(z, centroids, target) for z in (before, after)])
        return self._described(delta, before, after, centroids, loss)

    @staticmethod
    @torch.no_grad()
    def _described(
        delta: Tensor, before: Tensor, after: Tensor, centroids: Tensor, loss: Tensor | None
    ) -> QueryChange:
        return QueryChange(
            delta=delta,
            distance_before=squared_distances(before, centroids).sqrt(),
            distance_after=squared_distances(after, centroids).sqrt(),
            loss=loss,
        )
