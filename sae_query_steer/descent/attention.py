"""Attention of a head on some keys as a goal: loss and closed-form gradient of its scores."""

from dataclasses import dataclass
from functools import cached_property

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
        own = self.inside ^ (self.weight < 0)[..., None]
        attention = visible(scores).softmax(-1)
        masses = torch.bmm(attention, own.movedim(0, -1).to(attention.dtype))
        return masses.masked_fill((self.weight == 0).T[:, None], torch.nan)

    def loss(self, scores: Scores) -> Float[Tensor, "token head"]:
        """Return the loss of each token and head, 0 or more."""
        scores = visible(scores)
        log = (_only(scores, self.inside).logsumexp(-1) - scores.logsumexp(-1)).clamp(max=0)
        return -(self.weight.abs()[..., None] * log.where(log.isfinite(), 0)).sum(0)

    def gradient(self, scores: Scores) -> Scores:
        """Return the gradient of the loss: sum_i |w_i| (1 - m_i) (b_i - a_i).

        a_i is the attention among the keys of m_i alone, and b_i that among all others. So it is a
        - a_i, with the attention a, without the difference of two nearly equal numbers.
        """
        return self.visible_gradient(visible(scores))

    def visible_gradient(self, scores: Scores) -> Scores:
        """Return the same of scores that are minus infinity where a mask hides the key."""
        apart, others = (part.to(scores.dtype) for part in self._parts)
        rest = torch.bmm(scores.softmax(-1), others)
        outside, within = (scores + apart).softmax(-1)
        # NaN where no key of one of the two is visible
        pull = (rest.movedim(-1, 0)[..., None] * (outside - within)).nan_to_num(0)
        return pull[0] if len(pull) == 1 else pull.sum(0)

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        """What leaves only the other keys, or those of m_i, and the weight of each other key."""
        keys = torch.stack([~self.inside, self.inside])[:, :, :, None]
        apart = torch.zeros(keys.shape, device=keys.device).masked_fill(~keys, -torch.inf)
        others = ~self.inside * self.weight.abs()[..., None]
        return apart, others.movedim(0, -1)


def _only(scores: Tensor, keys: Tensor) -> Tensor:
    """Return scores [source token head key], minus infinity at all but some keys."""
    return scores.masked_fill(~keys[:, :, None], -torch.inf)


def visible(scores: Scores) -> Scores:
    """Return scores in 32 bits at least, minus infinity where a mask hides the key."""
    hidden = scores <= torch.finfo(scores.dtype).min / 2
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.to(dtype).masked_fill(hidden, -torch.inf)
