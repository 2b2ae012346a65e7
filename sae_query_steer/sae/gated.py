"""Gated: one half of the encoder decides which latents fire, the other how strongly."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from sae_lens.registry import register_sae_class, register_sae_training_class
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor, nn
from typing_extensions import override

from sae_query_steer.sae.core import (
    HeadedIn,
    HeadedLatents,
    QueryHeadSAE,
    QueryHeadSAEConfig,
    QueryHeadTrainingSAE,
)
from sae_query_steer.sae.penalty import L1TrainingSAEConfig

ARCHITECTURE = "query_head_gated"


@dataclass(kw_only=True)
class QueryHeadGatedSAEConfig(QueryHeadSAEConfig):
    """Gated latents of each head."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


T_GATED = TypeVar("T_GATED", bound=QueryHeadGatedSAEConfig)


class QueryHeadGatedSAE(QueryHeadSAE[T_GATED]):
    """Gated SAEs of all heads of a query site.

    Both halves share `W_enc`: the gate adds `b_gate`, the magnitude scales by `exp(r_mag)` and adds
    `b_mag`, each [head d_sae_per_head]. There is no `b_enc`. Pre-activations are magnitudes.
    """

    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    in_units_of_pre = ("b_gate", "b_mag")

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_mag))

    def gate_pre(self, x: HeadedIn) -> HeadedLatents:
        """Return the pre-activations of the gate; a latent fires where they are above zero."""
        return self.linear_encode(x, self.W_enc, self.b_gate)

    @override
    def hidden_pre(self, x: HeadedIn) -> HeadedLatents:
        """Return the pre-activations of the magnitude."""
        return self.linear_encode(x, self.W_enc * self.r_mag.exp()[:, None], self.b_mag)

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep what is above zero, gate or no gate."""
        return hidden_pre.relu()

    @override
    def latents_of(self, hidden_pre: HeadedLatents, x: HeadedIn) -> HeadedLatents:
        """Keep the magnitudes whose gate is open."""
        return self.activation(hidden_pre) * (self.gate_pre(x) > 0)


@dataclass(kw_only=True)
class QueryHeadGatedTrainingSAEConfig(QueryHeadGatedSAEConfig, L1TrainingSAEConfig):
    """Gated with SAELens's penalty on open gates."""


class QueryHeadGatedTrainingSAE(
    QueryHeadGatedSAE[QueryHeadGatedTrainingSAEConfig],
    QueryHeadTrainingSAE[QueryHeadGatedTrainingSAEConfig],
):
    """Gated SAEs of all heads of a query site, in training."""

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return self.cfg.coefficients()

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """Return, summed over heads, the penalty and the error of what the gates alone decode.

        The gate learns from these two alone, for no gradient comes through its step. As in SAELens,
        the decoder learns from the second, too.
        """
        x = self.heads_of_queries(step_input.sae_in)
        gate = self.gate_pre(x).relu()
        return {
            "l1_loss": step_input.coefficients["l1"] * self._penalty(gate),
            "auxiliary_reconstruction_loss": self._via_gate_error(gate, x),
        }

    def _penalty(self, gate: Float[Tensor, "batch head d_sae_per_head"]) -> Float[Tensor, ""]:
        return (gate * self.W_dec.norm(dim=-1)).sum((1, 2)).mean()

    def _via_gate_error(
        self,
        gate: Float[Tensor, "batch head d_sae_per_head"],
        x: Float[Tensor, "batch head d_head"],
    ) -> Float[Tensor, ""]:
        return (self.linear_decode(gate) + self.b_dec - x).square().sum((1, 2)).mean()

    @override
    def log_histograms(self) -> dict[str, Any]:
        """Return the decoder norms and both biases of all latents of all heads."""
        return super().log_histograms() | {
            f"weights/{name}": getattr(self, name).detach().float().flatten().cpu().numpy()
            for name in self.in_units_of_pre
        }


register_sae_class(ARCHITECTURE, QueryHeadGatedSAE, QueryHeadGatedSAEConfig)
register_sae_training_class(
    ARCHITECTURE, QueryHeadGatedTrainingSAE, QueryHeadGatedTrainingSAEConfig
)
