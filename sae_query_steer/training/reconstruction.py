"""How well SAEs reconstruct queries: per-head scores over batches of a stream."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sites import QuerySite
from sae_query_steer.training.stream import Queries


class ReconstructionMoments:
    """Accumulates per-head scores of an SAE in constant memory; the scores are SAELens's."""

    n_tokens: int = 0
    """Tokens seen."""

    _sums: tuple[Tensor, ...] = ()

    def update(
        self,
        x: Float[Tensor, "token head d_head"],
        reconstruction: Float[Tensor, "token head d_head"],
        latents: Float[Tensor, "token head d_sae"],
    ) -> None:
        """Add a batch of queries with their reconstructions and latents."""
        cosine = cosine_similarity(x.float(), reconstruction.float(), dim=-1)
        x, reconstruction, fired = x.double(), reconstruction.double(), latents > 0
        sums = (
            x.sum(0),
            x.square().sum((0, 2)),
            (x - reconstruction).square().sum((0, 2)),
            fired.sum(0),
            cosine.double().sum(0),
        )
        first = self.n_tokens == 0
        self._sums = sums if first else tuple(map(torch.add, self._sums, sums))
        self.n_tokens += x.shape[0]

    @property
    def mean(self) -> Float[Tensor, "head d_head"]:
        """Mean query of each head."""
        return self._sums[0] / self.n_tokens

    def cosine(self, heads: slice) -> Float[Tensor, ""]:
        """Return the mean cosine of query and reconstruction over tokens and some heads."""
        return self._sums[4][heads].mean() / self.n_tokens

    def explained_variance(self, *, pooled: slice | None = None) -> Float[Tensor, "..."]:
        """Return 1 - E||x - x_hat||^2 / (E||x||^2 - ||E x||^2) of each head.

        Args:
            pooled: heads whose queries are taken as one vector instead, for a single score.
        """
        mean, square, error, *_ = (total / self.n_tokens for total in self._sums)
        variance = square - mean.square().sum(-1)
        if pooled is not None:
            error, variance = error[pooled].sum(), variance[pooled].sum()
        return 1 - error / variance

    def l0(self) -> Float[Tensor, " head"]:
        """Return the mean number of latents that fire at a token, of each head."""
        return self._sums[3].sum(-1) / self.n_tokens

    def dead_share(self) -> Float[Tensor, " head"]:
        """Return the share of each head's latents that fired at none of the tokens seen."""
        return (self._sums[3] == 0).double().mean(-1)


@torch.no_grad()
def reconstruction_metrics(
    saes: Mapping[str, QueryHeadSAE[Any]], batches: Iterable[Queries]
) -> pd.DataFrame:
    """Return L0, explained variance and share of dead latents of every head.

    Args:
        saes: the SAEs by hook name.
        batches: flat queries [token head*d_head] by hook name.

    Returns:
        One row per layer and head with the columns layer, head, l0, explained_variance,
        dead_share (latents that fired at none of these tokens) and n_tokens; empty without SAEs.
    """
    moments = {name: ReconstructionMoments() for name in saes}
    for batch in batches:
        for name, sae in saes.items():
            x = batch[name].to(sae.device).unflatten(-1, (sae.n_heads, sae.cfg.d_head))
            latents = sae.encode(x)
            moments[name].update(x, sae.decode(latents), latents)
    tables = [
        pd.DataFrame(
            {
                "layer": QuerySite.from_hook_name(name, n_heads=1, d_head=1).layer,
                "head": range(saes[name].n_heads),
                "l0": moment.l0().tolist(),
                "explained_variance": moment.explained_variance().tolist(),
                "dead_share": moment.dead_share().tolist(),
                "n_tokens": moment.n_tokens,
            }
        )
        for name, moment in moments.items()
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
