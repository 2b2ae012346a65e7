"""Matryoshka BatchTopK: the first latents of a head must reconstruct its queries on their own."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float
from sae_lens.registry import register_sae_training_class
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_query_steer.sae.batchtopk import (
    QueryHeadBatchTopKTrainingSAE,
    QueryHeadBatchTopKTrainingSAEConfig,
)

ARCHITECTURE = "query_head_matryoshka_batchtopk"


@dataclass(kw_only=True)
class QueryHeadMatryoshkaBatchTopKTrainingSAEConfig(QueryHeadBatchTopKTrainingSAEConfig):
    """BatchTopK with a loss for each of several nested widths; inference is JumpReLU."""

    matryoshka_widths: list[int] = field(default_factory=list)
    """Latents of one head at each level, rising; the last is `d_sae_per_head`."""

    use_matryoshka_aux_loss: bool = False
    """Let the dead latents of a level learn from the error of that level, not of all of them."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        widths = [0, *self.matryoshka_widths]
        rising = all(narrow < wide for narrow, wide in pairwise(widths))
        if len(widths) < 3 or not rising or widths[-1] != self.d_sae_per_head:
            raise ValueError(
                f"matryoshka_widths={self.matryoshka_widths} is not allowed: give two or more "
                f"rising widths of 1 or more, the last of them d_sae_per_head={self.d_sae_per_head}"
                "; for one width use QueryHeadBatchTopKTrainingSAEConfig"
            )

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class QueryHeadMatryoshkaBatchTopKTrainingSAE(QueryHeadBatchTopKTrainingSAE):
    """Matryoshka BatchTopK SAEs of all heads of a query site, in training.

    For inference it is saved as `QueryHeadJumpReLUSAE`, as SAELens saves its own as JumpReLU.

    Source: arXiv 2503.17547 as SAELens has it.
    """

    cfg: QueryHeadMatryoshkaBatchTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and outputs of a batch, with a loss for each inner width."""
        output = super().training_forward_pass(step_input)
        x = self.heads_of_queries(step_input.sae_in)
        *inner, _ = self._levels(self.heads_of_latents(output.feature_acts))
        for _, width, decoded in inner:
            loss = (decoded - x).square().sum((1, 2)).mean()
            output.losses[f"inner_mse_loss_{width}"] = loss
            output.loss = output.loss + loss
        return output

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """Return the auxiliary loss of each head, or of each level of each head, summed."""
        dead = step_input.dead_neuron_mask
        if not self.cfg.use_matryoshka_aux_loss or dead is None or not bool(dead.any()):
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        x, pre = self.heads_of_queries(step_input.sae_in), self.heads_of_latents(hidden_pre)
        place = torch.arange(self.d_latent, device=dead.device)
        dead = dead.unflatten(0, (self.n_heads, self.d_latent))
        loss = sae_out.new_tensor(0.0)
        for start, width, decoded in self._levels(self.heads_of_latents(feature_acts)):
            here = dead & (place >= start) & (place < width)
            loss = loss + self._aux_loss(residual=x - decoded, hidden_pre=pre, dead=here)
        return {"auxiliary_reconstruction_loss": loss}

    def _levels(
        self, latents: Float[Tensor, "batch head d_sae_per_head"]
    ) -> Iterator[tuple[int, int, Float[Tensor, "batch head d_head"]]]:
        """Give each level's first latent, its end, and what all latents before its end decode."""
        place, decoded = torch.arange(self.d_latent, device=latents.device), self.b_dec
        for start, width in pairwise([0, *self.cfg.matryoshka_widths]):
            here = (place >= start) & (place < width)
            decoded = self.linear_decode(latents * here) + decoded
            yield start, width, decoded


register_sae_training_class(
    ARCHITECTURE,
    QueryHeadMatryoshkaBatchTopKTrainingSAE,
    QueryHeadMatryoshkaBatchTopKTrainingSAEConfig,
)
