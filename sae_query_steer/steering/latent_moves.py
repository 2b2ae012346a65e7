"""Where a steer leads the latents of some tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.descent.goals import Goal
from sae_query_steer.descent.objectives import squared_distances
from sae_query_steer.steering.trace import QueryChange

N_MOVED = 5
"""Latents that a trace names for each token and head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentMove:
    """The latents of the steered heads of a site before and after a steer."""

    before: Float[Tensor, "token head d_latent"]
    """Of the queries as they came."""

    after: Float[Tensor, "token head d_latent"]
    """Where the steer leads them."""

    goal: Goal
    """Where they were to go."""

    loss: Float[Tensor, "steps token head"] | None = None
    """Loss before the first step and after each; None unless recorded."""

    temperature: float = 1.0
    """Of the posterior."""

    @torch.no_grad()
    def described(self, delta: Float[Tensor, "token head d_head"]) -> QueryChange:
        """Return a change of the queries, with what this move says of it."""
        moved = self.after - self.before
        most = moved.abs().topk(min(N_MOVED, moved.shape[-1]), dim=-1).indices
        return QueryChange(
            delta=delta,
            distance_before=squared_distances(self.before, self.goal.centroids).sqrt(),
            distance_after=squared_distances(self.after, self.goal.centroids).sqrt(),
            loss=self.loss,
            moved_latents=most,
            moved_by=moved.gather(-1, most),
            n_moved=(moved != 0).sum(-1),
            temperature=self.temperature,
        )
