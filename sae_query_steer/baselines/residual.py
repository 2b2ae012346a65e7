"""The difference of class means in the residual stream: the usual steering vector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sae_query_steer.baselines.added import AddedDirection, above_others
from sae_query_steer.baselines.residual_stream import ResidualMeans, residual_hook
from sae_query_steer.scopes.positions import LastPromptToken, Scope
from sae_query_steer.sites import Site
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.where import Where


@dataclass(frozen=True, eq=False)
class _FromMeans:
    """The means of some layers, as what a steerer was made from."""

    means: ResidualMeans
    layers: tuple[int, ...]

    def check_model(self, model: Any) -> None:
        self.means.check(model, self.layers)

    def to(self, device: str | torch.device) -> "_FromMeans":
        del device
        return self


def residual_mean_difference(
    means: ResidualMeans,
    *,
    target: str | Sequence[str],
    strength: float | Sequence[float],
    scope: Scope | None = None,
    layers: Sequence[int] | None = None,
) -> Steerer:
    """Return a steerer that adds strength * (mean of the target class - mean of the others' means).

    To `blocks.L.hook_resid_post`, at scoped positions of every layer named. The original steers
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
    sites = [
        Site(hook_name=residual_hook(layer), n_heads=1, d_head=mean.shape[1])
        for layer, mean in means.means.items()
    ]
    where = Where(sites, scope=LastPromptToken() if scope is None else scope, layers=layers)
    edit = AddedDirection(
        directions={
            residual_hook(layer): above_others(mean)[:, None] for layer, mean in means.means.items()
        },
        classes=means.classes,
        target=target,
        strength=strength,
        method="residual mean difference",
    )
    chosen = tuple(at.site.layer for at in where.chosen.values())
    return Steerer(edit, where, origin=_FromMeans(means, chosen))
