"""The difference of class means in the residual stream: the usual steering vector."""

from collections.abc import Sequence
from typing import Any

from sae_query_steer.arguments import check_kind, whole_numbers
from sae_query_steer.baselines.added import AddedDirection, above_others
from sae_query_steer.data.tokenized import TokenizedExamples
from sae_query_steer.sae.encoders import IdentityEncoder
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Scope
from sae_query_steer.sites import Site
from sae_query_steer.steering.origin import FromCentroids
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.where import Where
from sae_query_steer.targets.builder import CentroidTargetBuilder
from sae_query_steer.targets.centroids import CentroidTargets


def residual_means(
    model: Any, examples: TokenizedExamples, layers: Sequence[int]
) -> CentroidTargets:
    """Return the mean residual stream of each class of labelled texts, after some layers.

    Centroids of `blocks.L.hook_resid_post` as a site of one head, without an SAE.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        examples: tokenised labelled texts.
        layers: after which layers.

    Raises:
        ValueError: no such layer, or what `CentroidTargetBuilder.fit` refuses.
    """
    sites = [
        Site.of(model, f"blocks.{layer}.hook_resid_post")
        for layer in whole_numbers("layers", layers)
    ]
    encoders = {s.hook_name: IdentityEncoder(n_heads=1, d_head=s.d_head) for s in sites}
    return CentroidTargetBuilder(model, encoders).fit(examples)


def residual_mean_difference(
    means: CentroidTargets,
    *,
    target: str | Sequence[str],
    strength: float | Sequence[float],
    scope: Scope | None = None,
    layers: Sequence[int] | None = None,
) -> Steerer:
    """Return a steerer that adds strength * (mean of the target class - mean of the others' means).

    To `blocks.L.hook_resid_post`, at scoped tokens, after every layer named. The original steers
    one layer at a time; over several, each adds its own difference to what came before. In a trace
    the head is -1, and query_norm and relative_change are of the residual stream.

    Args:
        means: from `residual_means`.
        target: the class to steer towards; a list has one for each row of the batch.
        strength: 1 adds the whole difference; 0 or more; a list likewise.
        scope: which tokens; None means the last prompt token.
        layers: after which layers; None means all that have means.

    Raises:
        ValueError: a class, strength or layer that is not allowed.

    Source: contrastive activation addition (arXiv 2312.06681). There the difference is the mean
    over contrastive pairs of a positive and a negative example, and it is added at every position
    after the prompt, with a coefficient of either sign; ours is the difference of the means of
    classes, whose texts need no partners, and is added in the scope.
    """
    check_kind("means", means, CentroidTargets, "give what residual_means returns")
    sites = [
        Site(hook_name=name, n_heads=1, d_head=mean.shape[-1]) for name, mean in means.means.items()
    ]
    where = Where(sites, scope=LastPromptToken() if scope is None else scope, layers=layers)
    encoders = {
        name: IdentityEncoder(n_heads=1, d_head=at.site.d_head) for name, at in where.chosen.items()
    }
    edit = AddedDirection(
        directions={name: above_others(means.means[name]) for name in encoders},
        classes=means.classes,
        target=target,
        strength=strength,
        method="residual mean difference",
    )
    return Steerer(edit, where, origin=FromCentroids(encoders, means))
