"""Steering without a descent: add the decoder rows of the latents that mark a class."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.arguments import check_kind, check_number
from sae_query_steer.baselines.added import AddedDirection, above_others
from sae_query_steer.descent.objectives import CentroidContrast
from sae_query_steer.sae.encoders import QueryEncoder, device_of, encoder_sites
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Scope
from sae_query_steer.steering.latent_descent import LatentDescent
from sae_query_steer.steering.origin import FromCentroids
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.where import Heads, Where
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import check_shapes


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
    where = Where(
        encoder_sites(saes).values(),
        scope=LastPromptToken() if scope is None else scope,
        layers=layers,
        heads=heads,
    )
    encoders = {name: saes[name] for name in where.chosen}
    check_shapes(targets, encoders)
    directions = {name: _direction(encoders[name], targets, name, m) for name in encoders}
    edit = AddedDirection(
        directions=directions,
        classes=targets.classes,
        target=target,
        strength=strength,
        method=f"decoder rows (m={m})",
        described_by=still,
    )
    return Steerer(edit, where, origin=FromCentroids(encoders, targets))


def class_latents(
    targets: CentroidTargets, target: str, *, m: int = 4
) -> dict[str, dict[int, list[int]]]:
    """Return the latents of a class whose decoder rows `decoder_rows` adds, best first.

    Args:
        targets: the centroids.
        target: the class.
        m: latents of each head, 1 or more.

    Returns:
        Latents by hook name and head, in the form that `GivenLatents` takes.

    Raises:
        ValueError: no such class.
    """
    check_kind("targets", targets, CentroidTargets, "as CentroidTargetBuilder.fit returns")
    index, chosen = targets.class_index(target), {}
    for name in targets.means:
        marks = _marks(targets, name)[index]
        best = _best(marks, m)
        chosen[name] = {
            head: [i for i in best[head].tolist() if own[i] > 0] for head, own in enumerate(marks)
        }
    return chosen


@torch.no_grad()
def _direction(
    encoder: QueryEncoder, targets: CentroidTargets, hook_name: str, m: int
) -> Float[Tensor, "class head d_head"]:
    """Return what is added at strength 1."""
    marks = _marks(targets, hook_name)
    best = torch.zeros_like(marks, dtype=torch.bool).scatter(-1, _best(marks, m), True)
    rise = above_others(targets.means[hook_name])
    weights = torch.where(best & (marks > 0), rise, 0.0)
    weights = weights.to(device_of(encoder) or weights.device)
    # The difference of two decodings: the rows as the encoder reads them, without its bias.
    return encoder.decode(weights) - encoder.decode(torch.zeros_like(weights))


def _marks(targets: CentroidTargets, hook_name: str) -> Float[Tensor, "class head d_latent"]:
    """Return how far the class's mean of a latent lies above the others', in its deviations.

    The classes are weighed alike; a latent that never fires marks none.
    """
    means, variances = targets.means[hook_name], targets.variances[hook_name]
    total = means.var(0, correction=0) + variances.mean(0)
    return torch.where(total > 0, above_others(means) / total.sqrt(), 0.0)


def _best(marks: Float[Tensor, "*any d_latent"], m: int) -> Int[Tensor, "*any m"]:
    return marks.argsort(dim=-1, descending=True, stable=True)[..., :m]
