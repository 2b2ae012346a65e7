"""How a descent moves the latents of some tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.descent.goals import Goal
from sae_query_steer.descent.objectives import squared_distances
from sae_query_steer.steering.trace import QueryChange

N_MOVED = 5
"""Number of latents that a trace lists for each token and head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentMove:
    """The latents of the steered heads of a site before and after a descent."""

    before: Float[Tensor, "token head d_latent"]
    """Latents of the queries before the change."""

    after: Float[Tensor, "token head d_latent"]
    """Latents at the end of the descent."""

    goal: Goal
    """Goal of the descent."""

    loss: Float[Tensor, "steps token head"] | None = None
    """Loss before the first step and after each; None unless recorded."""

    temperature: float = 1.0
    """T of the posterior."""

    has_points: bool = True
    """Whether the goal has points, so that there are distances."""

    @torch.no_grad()
    def described(self, delta: Float[Tensor, "token head d_head"]) -> QueryChange:
        """Return the change of the queries, with distances, loss and most moved latents."""
        if not self.has_points:
            return QueryChange(delta=delta, **most_moved(self.before, self.after))
        return QueryChange(
            delta=delta,
            distance_before=squared_distances(self.before, self.goal.centroids).sqrt(),
            distance_after=squared_distances(self.after, self.goal.centroids).sqrt(),
            loss=self.loss,
            temperature=self.temperature,
            **most_moved(self.before, self.after),
        )


def most_moved(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Return `moved_latents`, `moved_by` and `n_moved` of a `QueryChange`."""
    moved = after - before
    most = moved.abs().topk(min(N_MOVED, moved.shape[-1]), dim=-1).indices
    return {
        "moved_latents": most,
        "moved_by": moved.gather(-1, most),
        "n_moved": (moved != 0).sum(-1),
    }
