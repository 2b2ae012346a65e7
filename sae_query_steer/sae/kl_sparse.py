"""KL-sparse: latents between 0 and 1, each of which should be so strong on average."""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from sae_lens.registry import register_sae_class, register_sae_training_class
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor
from typing_extensions import override

from sae_query_steer.sae.core import (
    HeadedLatents,
    QueryHeadSAE,
    QueryHeadSAEConfig,
    QueryHeadTrainingSAE,
    QueryHeadTrainingSAEConfig,
)
from sae_query_steer.sae.penalty import check_steps, check_weight

ARCHITECTURE = "query_head_kl_sparse"


@dataclass(kw_only=True)
class QueryHeadKLSparseSAEConfig(QueryHeadSAEConfig):
    """Sigmoid latents of each head."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


T_KL_SPARSE = TypeVar("T_KL_SPARSE", bound=QueryHeadKLSparseSAEConfig)


class QueryHeadKLSparseSAE(QueryHeadSAE[T_KL_SPARSE]):
    """Sigmoid SAEs of all heads of a query site: every latent lies between 0 and 1."""

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Squash to between 0 and 1."""
        return hidden_pre.sigmoid()

    @override
    def fold_and_get_W_dec_norm(self) -> Float[Tensor, "head d_sae_per_head"]:
        raise NotImplementedError(
            "decoder norms can't be folded into an encoder with sigmoid latents: they do not "
            "scale with their pre-activations; scale the decoder's rows where you read them"
        )


@dataclass(kw_only=True)
class QueryHeadKLSparseTrainingSAEConfig(QueryHeadKLSparseSAEConfig, QueryHeadTrainingSAEConfig):
    """Sigmoid latents under a penalty on how far the mean of each is from `rho`."""

    rho: float = 0.05
    """Mean of every latent over tokens that costs nothing."""

    kl_coefficient: float = 1.0
    """Weight of the penalty."""

    kl_warm_up_steps: int = 0
    """Steps over which the weight grows from 0."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.rho) and 0 < self.rho < 1):
            raise ValueError(
                f"rho={self.rho} is not allowed: give a mean between 0 and 1, such as 0.05"
            )
        check_weight("kl_coefficient", self.kl_coefficient)
        check_steps("kl_warm_up_steps", self.kl_warm_up_steps)


class QueryHeadKLSparseTrainingSAE(
    QueryHeadKLSparseSAE[QueryHeadKLSparseTrainingSAEConfig],
    QueryHeadTrainingSAE[QueryHeadKLSparseTrainingSAEConfig],
):
    """Sigmoid SAEs of all heads of a query site, in training.

    No latent is ever 0, so each fires at every token and none counts as dead.

    Source: arXiv 2502.18644 for the penalty; SAELens has no such architecture. The mean is over the
    batch of a step: our choice.
    """

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"kl": TrainCoefficientConfig(self.cfg.kl_coefficient, self.cfg.kl_warm_up_steps)}

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """Return the penalty, summed over the latents of all heads."""
        means = self.heads_of_latents(feature_acts).mean(0)
        penalty = bernoulli_kl(self.cfg.rho, means).sum()
        return {"kl_loss": step_input.coefficients["kl"] * penalty}


def bernoulli_kl(rho: float, means: Float[Tensor, "*latent"]) -> Float[Tensor, "*latent"]:
    """Return the Kullback-Leibler divergence from a coin of mean `rho` to coins of given means.

        rho log(rho / mean) + (1 - rho) log((1 - rho) / (1 - mean))

    Args:
        rho: between 0 and 1.
        means: from 0 to 1; 0 and 1 themselves count as the nearest number that is not.

    Returns:
        In nats, 0 or more, 0 where the mean is `rho`.
    """
    tiny = torch.finfo(means.dtype).eps / 2
    means = means.clamp(tiny, 1 - tiny)
    entropy = rho * math.log(rho) + (1 - rho) * math.log(1 - rho)
    return entropy - rho * means.log() - (1 - rho) * (-means).log1p()


register_sae_class(ARCHITECTURE, QueryHeadKLSparseSAE, QueryHeadKLSparseSAEConfig)
register_sae_training_class(
    ARCHITECTURE, QueryHeadKLSparseTrainingSAE, QueryHeadKLSparseTrainingSAEConfig
)
