"""Standard: ReLU latents under an L1 penalty."""

from dataclasses import dataclass
from typing import TypeVar

from einops import rearrange
from sae_lens.registry import register_sae_class, register_sae_training_class
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor
from typing_extensions import override

from sae_query_steer.sae.core import (
    HeadedLatents,
    QueryHeadSAE,
    QueryHeadSAEConfig,
    QueryHeadTrainingSAE,
)
from sae_query_steer.sae.penalty import L1TrainingSAEConfig

ARCHITECTURE = "query_head_standard"


@dataclass(kw_only=True)
class QueryHeadStandardSAEConfig(QueryHeadSAEConfig):
    """ReLU latents of each head."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


T_STANDARD = TypeVar("T_STANDARD", bound=QueryHeadStandardSAEConfig)


class QueryHeadStandardSAE(QueryHeadSAE[T_STANDARD]):
    """ReLU SAEs of all heads of a query site."""

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep what is above zero."""
        return hidden_pre.relu()


@dataclass(kw_only=True)
class QueryHeadStandardTrainingSAEConfig(QueryHeadStandardSAEConfig, L1TrainingSAEConfig):
    """ReLU with SAELens's sparsity penalty."""

    lp_norm: float = 1.0
    """p of the norm over the latents of one head that is penalised."""


class QueryHeadStandardTrainingSAE(
    QueryHeadStandardSAE[QueryHeadStandardTrainingSAEConfig],
    QueryHeadTrainingSAE[QueryHeadStandardTrainingSAEConfig],
):
    """ReLU SAEs of all heads of a query site, in training."""

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
        """Return the penalty of each head, summed over heads."""
        headed = rearrange(feature_acts, "b (h s) -> b h s", h=self.cfg.n_heads)
        sparsity = (headed * self.W_dec.norm(dim=-1)).norm(p=self.cfg.lp_norm, dim=-1)
        return {"l1_loss": step_input.coefficients["l1"] * sparsity.sum(-1).mean()}


register_sae_class(ARCHITECTURE, QueryHeadStandardSAE, QueryHeadStandardSAEConfig)
register_sae_training_class(
    ARCHITECTURE, QueryHeadStandardTrainingSAE, QueryHeadStandardTrainingSAEConfig
)
