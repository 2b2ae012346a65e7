"""Which tokens' keys a latent's decoder direction matches."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.data.batches import PAD
from sae_query_steer.diagnostics.moved import decoder_rows
from sae_query_steer.sae.encoders import QueryEncoder

MIN_SEEN = 3
"""Tokens of an id that a mean key is taken of, at least: of one alone it would be its context's."""

MAX_IDS = 8192
"""Ids whose mean key is kept, the commonest: 64 MiB for 8 key heads of 128."""


class KeyMeans:
    """Streams the mean key of every token id that the texts have often enough.

    Args:
        rows: the texts' token ids; -1 is padding.
    """

    def __init__(self, rows: Int[Tensor, "row pos"]) -> None:
        ids, counts = rows[rows != PAD].unique(return_counts=True)
        often = counts >= (MIN_SEEN if int(counts.max()) >= MIN_SEEN else 1)
        ids, counts = ids[often], counts[often]
        commonest = counts.argsort(descending=True, stable=True)[:MAX_IDS].sort().values
        self.ids, self.counts = ids[commonest], counts[commonest]
        self._sums = self._total = torch.zeros(1)
        self._n = 0

    def update(self, keys: Float[Tensor, "token key_head d_head"], tokens: Tensor) -> None:
        """Add the keys of some tokens."""
        keys = keys.cpu().double()
        index = torch.searchsorted(self.ids, tokens).clamp(max=len(self.ids) - 1)
        known = self.ids[index] == tokens
        if self._n == 0:
            self._sums = keys.new_zeros(len(self.ids), *keys.shape[1:])
        self._sums.index_add_(0, index[known], keys[known])
        self._total = self._total + keys.sum(0)
        self._n += len(keys)

    def beyond_mean(self) -> Float[Tensor, "id key_head d_head"]:
        """Return the mean key of each id, less the mean of all keys, which attention can't see."""
        return (self._sums / self.counts[:, None, None] - self._total / self._n).float()


def key_matches(
    means: KeyMeans, encoder: QueryEncoder, heads: tuple[int, ...], *, n: int
) -> tuple[Int[Tensor, "head d_latent n"], Float[Tensor, "head d_latent n"]]:
    """Return for each latent the token ids whose keys match its decoder row best, and the scores.

    With w the decoder row and k_t the mean key of token id t in the texts:

        score_t = <w, k_t - mean over all tokens of k> / sqrt(d_head)

    is what one unit of the latent adds to the attention logit, beyond that of a mean key. At
    `hook_q` both sides are before rotary embedding, so the match ignores distance; at `hook_rot_q`
    both are after it.

    Args:
        means: of the keys of this site's layer.
        encoder: the SAE of all heads.
        heads: of which heads.
        n: ids of each latent; fewer where fewer have a mean.

    Source: our choice.
    """
    keys = means.beyond_mean()
    best = []
    for head, rows in zip(heads, decoder_rows(encoder, heads).float().cpu(), strict=True):
        own = keys[:, head * keys.shape[1] // encoder.n_heads]
        best.append((rows @ own.T / encoder.d_head**0.5).topk(min(n, len(keys)), dim=-1))
    return (
        means.ids[torch.stack([match.indices for match in best])],
        torch.stack([match.values for match in best]),
    )
