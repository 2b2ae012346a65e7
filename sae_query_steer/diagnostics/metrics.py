"""Scores of SAEs, as the field defines them, per head."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import binomtest
from torch import Tensor


@dataclass(eq=False)
class ReconstructionMoments:
    """Streams what per-head scores of an SAE need, so that memory does not grow with the data.

    Source: the scores are those of SAELens's evals; explained variance is
    1 - E||x - x_hat||^2 / (E||x||^2 - ||E x||^2).
    """

    n_tokens: int = 0
    """Tokens seen."""

    def update(
        self,
        x: Float[Tensor, "token head d_head"],
        reconstruction: Float[Tensor, "token head d_head"],
        latents: Float[Tensor, "token head d_sae"],
    ) -> None:
        """Add a batch of queries with their reconstructions and latents."""
        x, reconstruction = x.double(), reconstruction.double()
        fired = latents > 0
        parts = (
            x.sum(0),
            x.square().sum((0, 2)),
            (x - reconstruction).square().sum((0, 2)),
            fired.sum((0, 2)),
            fired.sum(0),
        )
        if self.n_tokens == 0:
            self._sum, self._square, self._error, self._active, self._fired = parts
        else:
            self._sum += parts[0]
            self._square += parts[1]
            self._error += parts[2]
            self._active += parts[3]
            self._fired += parts[4]
        self.n_tokens += x.shape[0]

    def explained_variance(self, *, pooled: slice | None = None) -> Float[Tensor, "..."]:
        """Return 1 - E||x - x_hat||^2 / (E||x||^2 - ||E x||^2) of each head.

        Args:
            pooled: heads whose queries are taken as one vector instead, for a single score.
        """
        n = self.n_tokens
        error, variance = self._error / n, self._square / n - (self._sum / n).square().sum(-1)
        if pooled is not None:
            error, variance = error[pooled].sum(), variance[pooled].sum()
        return 1 - error / variance

    def l0(self) -> Float[Tensor, " head"]:
        """Return the mean number of latents that fire at a token, of each head."""
        return self._active / self.n_tokens

    def dead_share(self) -> Float[Tensor, " head"]:
        """Return the share of each head's latents that fired at none of the tokens seen."""
        return (self._fired == 0).double().mean(-1)


def kl_divergence(
    log_p: Float[Tensor, "*batch d_vocab"], log_q: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """Return KL(p || q) in nats of distributions given by their log probabilities.

    Where p is 0 the term is 0, as for a token that is masked out.
    """
    terms = log_p.exp() * (log_p - log_q)
    return terms.where(log_p > -torch.inf, 0.0).sum(-1)


def total_variation(
    log_p: Float[Tensor, "*batch d_vocab"], log_q: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """Return 1/2 sum |p - q| of distributions given by their log probabilities, 0 to 1."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def wilson_interval(hits: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of the share `hits` out of `n`.

    Raises:
        ValueError: n below 1, or hits that are not 0 to n.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"n must be 1 or more and hits 0 to n, got n={n} and hits={hits}")
    interval = binomtest(hits, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)
