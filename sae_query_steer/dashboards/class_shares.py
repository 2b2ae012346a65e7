"""How far a single latent tells the classes apart."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.targets.centroids import CentroidTargets


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassShares:
    """What each latent of some heads tells of the classes."""

    share: Float[Tensor, "head d_latent"]
    """Share of the latent's variance that the class explains, 0 to 1; 0 where it never varies."""

    highest: Int[Tensor, "head d_latent"]
    """Index of the class with the largest mean; -1 where the latent never varies."""

    means: Float[Tensor, "head d_latent class"]
    """Mean of the latent in each class."""


def class_shares(targets: CentroidTargets, hook_name: str, heads: tuple[int, ...]) -> ClassShares:
    """Return for each latent the share of its variance that the class explains.

    Between classes over total: sum_k n_k (m_k - m)^2 / (that + sum_k n_k var_k), the same as
    `CentroidTargets.class_share_of_variance`, latent by latent. Where classes do not differ, n
    tokens of k classes give about (k - 1) / (n - 1), and the largest of many latents more.

    Args:
        targets: means, variances and counts of the classes.
        hook_name: the site.
        heads: of which heads.
    """
    means = targets.means[hook_name][:, list(heads)].double().cpu()
    variances = targets.variances[hook_name][:, list(heads)].double().cpu()
    counts = targets.counts.double().cpu()[:, None, None]
    centre = (counts * means).sum(0) / counts.sum()
    between = (counts * (means - centre).square()).sum(0)
    total = between + (counts * variances).sum(0)
    return ClassShares(
        share=torch.where(total > 0, between / total, 0.0).float(),
        highest=torch.where(total > 0, means.argmax(0), -1),
        means=means.permute(1, 2, 0).float(),
    )
