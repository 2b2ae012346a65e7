"""KL-sparse: sigmoid latents with a penalty on the distance of each mean from `rho`."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from sae_query_steer.sae.configs import (
    QueryHeadKLSparseSAEConfig,
    QueryHeadKLSparseTrainingSAEConfig,
)
from sae_query_steer.sae.core import (
    HeadedLatents,
    HeadedStep,
    PerHead,
    PerLatent,
    QueryHeadSAE,
    QueryHeadTrainingSAE,
)


class QueryHeadKLSparseSAE(QueryHeadSAE[Any], config=QueryHeadKLSparseSAEConfig):
    """Sigmoid SAEs of all heads of a query site: every latent lies between 0 and 1."""

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        return hidden_pre.sigmoid()

    @override
    def fold_and_get_W_dec_norm(self) -> PerLatent:
        raise NotImplementedError(
            "decoder norms can't be folded into an encoder with sigmoid latents, which do not "
            "scale with their pre-activations: scale the decoder rows where you read them"
        )


class QueryHeadKLSparseTrainingSAE(
    QueryHeadKLSparseSAE, QueryHeadTrainingSAE[Any], config=QueryHeadKLSparseTrainingSAEConfig
):
    """Sigmoid SAEs of all heads of a query site, in training.

    Latents are never 0, so each fires at every token and none counts as dead.

    Source: arXiv 2502.18644 for the penalty; the mean is over the batch of a step (our choice).
    """

    penalties = ("kl",)

    @override
    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        """Return the divergence of the mean of each latent from `rho`, summed over latents."""
        penalty = bernoulli_kl(self.cfg.rho, step.latents.mean(0))
        return {"kl_loss": step.weights["kl"] * penalty.sum(-1)}


def bernoulli_kl(rho: float, means: Float[Tensor, "*latent"]) -> Float[Tensor, "*latent"]:
    """Return the Kullback-Leibler divergence of Bernoulli distributions from one of mean `rho`.

        rho log(rho / mean) + (1 - rho) log((1 - rho) / (1 - mean))

    Args:
        rho: between 0 and 1.
        means: from 0 to 1; 0 and 1 are replaced by the nearest representable numbers between them.

    Returns:
        In nats, 0 or more, 0 where the mean is `rho`.
    """
    tiny = torch.finfo(means.dtype).eps / 2
    means = means.clamp(tiny, 1 - tiny)
    entropy = rho * math.log(rho) + (1 - rho) * math.log(1 - rho)
    return entropy - rho * means.log() - (1 - rho) * (-means).log1p()
