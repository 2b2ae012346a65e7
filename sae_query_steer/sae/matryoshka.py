"""Matryoshka BatchTopK: the first latents of a head must reconstruct its queries on their own."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from sae_query_steer.sae.batchtopk import (
    QueryHeadBatchTopKTrainingSAE,
)
from sae_query_steer.sae.configs import QueryHeadMatryoshkaBatchTopKTrainingSAEConfig
from sae_query_steer.sae.core import HeadedStep, PerHead


class QueryHeadMatryoshkaBatchTopKTrainingSAE(
    QueryHeadBatchTopKTrainingSAE, config=QueryHeadMatryoshkaBatchTopKTrainingSAEConfig
):
    """Matryoshka BatchTopK SAEs of all heads of a query site, in training; inference is JumpReLU.

    Source: arXiv 2503.17547 as SAELens implements it.
    """

    @override
    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        """Return the auxiliary loss, of all latents or of each level, and each inner error."""
        levels = list(self._levels(step.latents))
        losses = super().head_losses(step)
        if self.cfg.use_matryoshka_aux_loss and step.dead is not None:
            by_level = [
                self.aux_loss(step.queries - decoded, step.hidden_pre, step.dead & here)
                for _, here, decoded in levels
            ]
            losses = {"auxiliary_reconstruction_loss": torch.stack(by_level).sum(0)}
        for width, _, decoded in levels[:-1]:
            error = (decoded - step.queries).square().sum(-1)
            losses[f"inner_mse_loss_{width}"] = error.mean(0)
        return losses

    def _levels(
        self, latents: Float[Tensor, "batch head d_sae_per_head"]
    ) -> Iterator[tuple[int, Bool[Tensor, "d_sae_per_head"], Float[Tensor, "batch head d_head"]]]:
        """Yield each level's width, its own latents, and the decoding of all latents up to it."""
        place, decoded = torch.arange(self.d_latent, device=latents.device), self.b_dec
        for start, width in pairwise([0, *self.cfg.matryoshka_widths]):
            here = (place >= start) & (place < width)
            decoded = self.linear_decode(latents * here) + decoded
            yield width, here, decoded
