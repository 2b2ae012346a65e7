"""Steering without a descent: one direction for each class, added whatever the activation is.

The directions are differences of class means in any activations, or the decoder rows of the latents
that mark a class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.arguments import check_kind, check_name, check_number, whole_numbers
from sae_query_steer.data.tokenized import TokenizedExamples
from sae_query_steer.descent.objectives import CentroidContrast
from sae_query_steer.descent.strength import Queries, by_row, each, target_labels
from sae_query_steer.sae.encoders import (
    IdentityEncoder,
    QueryEncoder,
    any_sites,
    device_of,
    encoder_sites,
    identity_encoders,
)
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Scope, TokenPositions
from sae_query_steer.sites import QuerySite, Site, query_sites
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.latent_descent import LatentDescent
from sae_query_steer.steering.steerer import FromCentroids, Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import Heads, SiteHeads, Where
from sae_query_steer.targets.builder import CentroidTargetBuilder
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import check_shapes


@dataclass(frozen=True, kw_only=True, eq=False)
class AddedDirection(Edit):
    """Adds strength times the direction of the target class.

    Raises:
        ValueError: no such class, or a strength that is negative or not finite.
    """

    directions: Mapping[str, Float[Tensor, "class head d_head"]]
    """One for each class, by hook name, for all heads of the site."""

    classes: Sequence[str]
    """Names of the classes."""

    target: str | Sequence[str]
    """The class to steer towards; a list has one for each row of the batch."""

    strength: float | Sequence[float]
    """Factor of the direction, 0 or more; a list likewise."""

    method: str
    """Name in a trace."""

    described_by: LatentDescent | None = None
    """What gives a trace latents, distances and loss; None leaves them out."""

    def __post_init__(self) -> None:
        for strength in each(self.strength, "strength"):
            check_number("strength", strength, least=0)
        for target in each(self.target, "target"):
            check_name("class", target, self.classes)

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        return {"method": self.method, "classes": self.classes, **target_labels(self.target)}

    def to(self, device: str | torch.device) -> "AddedDirection":
        """Return it with its weights on a device; directions follow the activations."""
        other = self.described_by
        return replace(self, described_by=None if other is None else other.to(device))

    def change(
        self, activations: Queries, at: SiteHeads, tokens: TokenPositions, *, record: bool = False
    ) -> QueryChange:
        """Return what is added; Args as `Edit.change`."""
        targets = by_row("target", self.target, tokens)
        strengths = by_row("strength", self.strength, tokens)
        directions = self.directions[at.hook_name][:, list(at.heads)].to(activations)
        chosen = directions[[list(self.classes).index(name) for name in targets]]
        factors = torch.tensor(strengths, dtype=chosen.dtype, device=chosen.device)
        delta = factors[:, None, None] * chosen
        if not record or self.described_by is None:
            return QueryChange(delta=delta)
        return self.described_by.described(activations, at, tokens, delta)


def above_others(means: Float[Tensor, "class *shape"]) -> Float[Tensor, "class *shape"]:
    """Return each class's mean minus the mean of the other classes' means."""
    return (means - means.mean(0)) * (len(means) / (len(means) - 1))


KINDS = {"q": "query", "k": "key", "v": "value", "z": "head output"}
"""What a trace calls the activations of a hook point; others are the residual stream."""


def kind_of(means: CentroidTargets) -> str:
    """Return what the activations of some means are called."""
    return KINDS.get(next(iter(means.means)).rpartition("_")[-1], "residual")


def class_means(
    model: Any, examples: TokenizedExamples, layers: Sequence[int], at: str = "hook_resid_post"
) -> CentroidTargets:
    """Return the mean activation of each class of labelled texts at a hook point of some layers.

    They are centroids without an SAE; the residual stream is a site of one head.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        examples: tokenised labelled texts.
        layers: which layers.
        at: the hook point in its block, such as "attn.hook_q", "attn.hook_v", "attn.hook_z" or
            "hook_resid_post". Keys and values have the key heads of grouped-query attention.

    Raises:
        ValueError: no such layer or hook point, or what `CentroidTargetBuilder.fit` refuses.
    """
    sites: Sequence[QuerySite | Site]
    if at in ("attn.hook_q", "attn.hook_rot_q"):
        sites = query_sites(model, layers, rotated=at == "attn.hook_rot_q")
    else:
        sites = [Site.of(model, f"blocks.{n}.{at}") for n in whole_numbers("layers", layers)]
    return CentroidTargetBuilder(model, identity_encoders(sites)).fit(examples)


def mean_difference(
    means: CentroidTargets,
    *,
    target: str | Sequence[str],
    strength: float | Sequence[float],
    scope: Scope | None = None,
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
) -> Steerer:
    """Return a steerer that adds strength * (mean of the target class - mean of the others' means).

    At scoped tokens, in every layer and head named. With several layers each adds its own
    difference to what came before. Means of queries and of values make a steerer each; both
    together are `JoinedSteerers(mean_difference(queries, ...), mean_difference(values, ...))`.
    In a trace query_norm and relative_change are of the activation that changes; of the residual
    stream the head is -1.

    Args:
        means: from `class_means`, or centroids made with `identity_encoders`.
        target: the class to steer towards; a list has one for each row of the batch.
        strength: 1 adds the whole difference; 0 or more; a list likewise.
        scope: which tokens; None means the last prompt token.
        layers: which layers; None means all that have means.
        heads: which heads, of keys and values key heads: the same in every layer, or by layer; None
            means all.

    Raises:
        ValueError: a class, strength, layer or head that is not allowed.

    Source: in the residual stream contrastive activation addition (arXiv 2312.06681). There the
    difference is the mean over contrastive pairs of a positive and a negative example, and it is
    added at every position after the prompt, with a coefficient of either sign; ours is the
    difference of the means of classes, whose texts need no partners, and is added in the scope.
    At queries and values DISCO (arXiv 2509.16820), of which the abstract was read: how it chooses
    heads, tokens and the two strengths is not known here.
    """
    check_kind("means", means, CentroidTargets, "give what class_means returns")
    directions = {name: above_others(mean) for name, mean in means.means.items()}
    method = f"{kind_of(means)} mean difference"
    chosen: dict[str, Any] = {"target": target, "strength": strength, "method": method}
    return added(means, directions, **chosen, scope=scope, layers=layers, heads=heads)


def added(
    means: CentroidTargets,
    directions: Mapping[str, Float[Tensor, "class head d_head"]],
    *,
    scope: Scope | None,
    layers: Sequence[int] | None,
    heads: Heads | None,
    **edit: Any,
) -> Steerer:
    """Return a steerer that adds directions by hook name, where some means were taken.

    Args as `mean_difference`; `edit` has target, strength and method of `AddedDirection`.
    """
    sizes = {name: mean.shape[1:] for name, mean in means.means.items()}
    encoders = {n: IdentityEncoder(n_heads=h, d_head=d) for n, (h, d) in sizes.items()}
    scope = LastPromptToken() if scope is None else scope
    where = Where(any_sites(encoders).values(), scope=scope, layers=layers, heads=heads)
    origin = FromCentroids({name: encoders[name] for name in where.chosen}, means)
    edits = AddedDirection(directions=directions, classes=means.classes, **edit)
    return Steerer(edits, where, origin=origin)


def decoder_rows(
    saes: Mapping[str, QueryEncoder],
    targets: CentroidTargets,
    *,
    target: str | Sequence[str],
    strength: float | Sequence[float],
    m: int = 4,
    scope: Scope | None = None,
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
) -> Steerer:
    """Return a steerer that adds SAE decoder rows of a class's top latents to the query.

    Of each head the m latents count whose mean in the target class lies furthest above the mean of
    the other classes' means, in units of the latent's standard deviation; a head in which fewer
    lie above takes these. To the query is added strength * sum_i (mean_target - mean_others)_i *
    W_dec_i over them. At strength 1 this is what the mean latents of the class decode to beyond
    those of the others, as far as the m latents tell; with an identity encoder and m = d_head, the
    rising half of the mean difference. Nothing is encoded, and the SAE's error never enters.

    Args:
        saes: encoders by hook name; those of the layers that are steered.
        targets: the centroids that were made with these encoders on this model.
        target: the class to steer towards; a list has one for each row of the batch.
        strength: factor of what is added, 0 or more; a list likewise.
        m: latents of each head, 1 or more; a head of fewer latents gives all that rise.
        scope: which tokens; None means the last prompt token.
        layers: which layers; None means all that have an SAE.
        heads: which heads: the same in every layer, or by layer; None means all.

    Raises:
        ValueError: a strength, m, class, layer or head that is not allowed, or centroids of other
            encoders.

    Source: our choice, after the usual way to steer by an SAE, adding a feature's decoder row. The
    rows are weighted by the difference and the sum is not normalised, so that a head whose latents
    hardly know the class is hardly moved, and strength means the same in every head.
    """
    check_number("m", m, whole=True, least=1)
    still = LatentDescent(
        saes, targets, target=target, objective=CentroidContrast(), n_steps=0, step_size=0.0
    )
    sites = encoder_sites(saes).values()
    scope = LastPromptToken() if scope is None else scope
    where = Where(sites, scope=scope, layers=layers, heads=heads)
    encoders = {name: saes[name] for name in where.chosen}
    check_shapes(targets, encoders)
    edit = AddedDirection(
        directions={name: _rows(encoders[name], targets, name, m) for name in encoders},
        classes=targets.classes,
        target=target,
        strength=strength,
        method=f"decoder rows (m={m})",
        described_by=still,
    )
    return Steerer(edit, where, origin=FromCentroids(encoders, targets))


@torch.no_grad()
def _rows(
    encoder: QueryEncoder, targets: CentroidTargets, hook_name: str, m: int
) -> Float[Tensor, "class head d_head"]:
    """Return what is added at strength 1; see `decoder_rows`."""
    means, variances = targets.means[hook_name], targets.variances[hook_name]
    total, rise = means.var(0, correction=0) + variances.mean(0), above_others(means)
    marks = torch.where(total > 0, rise / total.sqrt(), 0.0)  # 0 for a latent that never fires
    best = marks.argsort(dim=-1, descending=True, stable=True)[..., :m]
    chosen = torch.zeros_like(marks, dtype=torch.bool).scatter(-1, best, True) & (marks > 0)
    weights = torch.where(chosen, rise, 0.0)
    weights = weights.to(device_of(encoder) or weights.device)
    # The difference of two decodings: the rows as the encoder reads them, without its bias.
    return encoder.decode(weights) - encoder.decode(torch.zeros_like(weights))
