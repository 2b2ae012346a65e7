"""Attention of a head on some keys as a goal: loss and closed-form gradient of its scores."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Scores = Float[Tensor, "token head key"]


@dataclass(frozen=True, eq=False)
class AttentionGoal:
    """Which keys heads are to look at, or away from: loss = -sum_i |w_i| log m_i.

    m_i is the attention on the keys of a source if w_i > 0, and on all others if w_i < 0. A source
    that a token cannot see, or cannot look away from, has no part in its loss.
    """

    inside: Bool[Tensor, "source token key"]
    """The keys of m_i."""

    weight: Float[Tensor, "source token"]
    """w_i; 0 where a row has fewer sources than others."""

    def masses(self, scores: Scores) -> Float[Tensor, "token head source"]:
        """Return the attention on each source, 0 to 1; NaN where its weight is 0."""
        log = self._log(_visible(scores))
        weight = self.weight[..., None]
        masses = torch.where(weight < 0, -torch.expm1(log), log.exp())
        return masses.masked_fill(weight == 0, torch.nan).movedim(0, -1)

    def loss(self, scores: Scores) -> Float[Tensor, "token head"]:
        """Return the loss of each token and head, 0 or more."""
        log = self._log(_visible(scores))
        return -(self.weight.abs()[..., None] * log.where(log.isfinite(), 0)).sum(0)

    def gradient(self, scores: Scores) -> Scores:
        """Return the gradient of the loss: sum_i |w_i| (a - a_i).

        a is the attention, and a_i that among the keys of m_i alone: a_j / m_i there, 0 elsewhere.
        """
        scores = _visible(scores)
        within = self._within(scores).softmax(-1)  # NaN where none of them is visible
        pull = self.weight.abs()[..., None, None] * (scores.softmax(-1) - within)
        return pull.nan_to_num(0).sum(0)

    def _within(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.inside[:, :, None], -torch.inf)

    def _log(self, scores: Tensor) -> Tensor:
        log = self._within(scores).logsumexp(-1) - scores.logsumexp(-1)
        return log.clamp(max=0)


def _visible(scores: Scores) -> Scores:
    """Return scores in 32 bits at least, minus infinity where a mask hides the key."""
    hidden = scores <= torch.finfo(scores.dtype).min / 2
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.to(dtype).masked_fill(hidden, -torch.inf)
