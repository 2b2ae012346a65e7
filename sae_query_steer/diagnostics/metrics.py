"""Scores of SAEs, as the field defines them, per head."""

import torch
from jaxtyping import Float
from scipy.stats import binomtest
from torch import Tensor


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
