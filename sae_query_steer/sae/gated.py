"""Gated: one half of the encoder decides which latents fire, the other how strongly."""

from typing import Any

import torch
from torch import nn
from typing_extensions import override

from sae_query_steer.sae.configs import QueryHeadGatedSAEConfig, QueryHeadGatedTrainingSAEConfig
from sae_query_steer.sae.core import (
    HeadedIn,
    HeadedLatents,
    HeadedStep,
    PerHead,
    QueryHeadSAE,
    QueryHeadTrainingSAE,
)


class QueryHeadGatedSAE(QueryHeadSAE[Any], config=QueryHeadGatedSAEConfig):
    """Gated SAEs of all heads of a query site.

    Both halves share `W_enc`: the gate adds `b_gate`; the magnitude scales by `exp(r_mag)` and adds
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
        return self.linear_encode(x, self.W_enc * self.r_mag.exp()[:, None], self.b_mag)

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Return the magnitudes, regardless of the gate."""
        return hidden_pre.relu()

    @override
    def latents_of(self, hidden_pre: HeadedLatents, x: HeadedIn) -> HeadedLatents:
        """Return the magnitudes whose gate is open."""
        return self.activation(hidden_pre) * (self.gate_pre(x) > 0)


class QueryHeadGatedTrainingSAE(
    QueryHeadGatedSAE, QueryHeadTrainingSAE[Any], config=QueryHeadGatedTrainingSAEConfig
):
    """Gated SAEs of all heads of a query site, in training."""

    penalties = ("l1",)

    @override
    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        """Return the L1 norm of the gates, and the squared error of what the gates alone decode.

        The gate learns from these two only, since its step has no gradient. As in SAELens, the
        decoder also learns from the second.
        """
        gate = self.gate_pre(step.queries).relu()
        sparsity = (gate * self.W_dec.norm(dim=-1)).sum(-1)
        error = self.linear_decode(gate) + self.b_dec - step.queries
        return {
            "l1_loss": step.weights["l1"] * sparsity.mean(0),
            "auxiliary_reconstruction_loss": error.square().sum(-1).mean(0),
        }
