"""Standard: ReLU latents with an Lp penalty."""

from typing import Any

from typing_extensions import override

from sae_query_steer.sae.configs import (
    QueryHeadStandardSAEConfig,
    QueryHeadStandardTrainingSAEConfig,
)
from sae_query_steer.sae.core import (
    HeadedLatents,
    HeadedStep,
    PerHead,
    QueryHeadSAE,
    QueryHeadTrainingSAE,
)


class QueryHeadStandardSAE(QueryHeadSAE[Any], config=QueryHeadStandardSAEConfig):
    """ReLU SAEs of all heads of a query site."""

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        return hidden_pre.relu()


class QueryHeadStandardTrainingSAE(
    QueryHeadStandardSAE, QueryHeadTrainingSAE[Any], config=QueryHeadStandardTrainingSAEConfig
):
    """ReLU SAEs of all heads of a query site, in training."""

    penalties = ("l1",)

    @override
    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        """Return the Lp norm of each token's latents, weighted by their decoder norms."""
        weighted = step.latents * self.W_dec.norm(dim=-1)
        sparsity = weighted.norm(p=self.cfg.lp_norm, dim=-1)
        return {"l1_loss": step.weights["l1"] * sparsity.mean(0)}
