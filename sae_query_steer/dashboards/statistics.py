"""What a second reading of the texts tells of every latent, once its top tokens are known."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.data.batches import PAD
from sae_query_steer.diagnostics.latent_texts import TopTokens, latents_by_row
from sae_query_steer.diagnostics.moved import decoder_rows
from sae_query_steer.models.activations import key_hook
from sae_query_steer.sae.encoders import QueryEncoder, encoder_sites

N_BINS = 24
"""Bins of a histogram."""

MIN_SEEN = 3
"""Tokens of an id that a mean key is taken of, at least: of one alone it would be its context's."""

MAX_IDS = 8192
"""Ids whose mean key is kept, the commonest: 64 MiB for 8 key heads of 128."""


class LatentStatistics:
    """How the latents of some heads of a site fire over the texts.

    `histogram` [head d_latent bin] counts tokens by activation, in equal bins from 0 to the
    latent's largest activation; `total` [head d_latent] sums the activations; `around`
    [head d_latent k window] has those around each top token, which stands in the middle, and 0
    beyond the ends of its text.
    """

    def __init__(self, tops: TopTokens, name: str, context: int) -> None:
        self._width, self._places = tops.rows.shape[1], tops.places[name]
        self._largest = tops.activations[name][..., 0]
        self._window = torch.arange(-context, context + 1)
        shape = self._largest.shape
        self.histogram = torch.zeros(*shape, N_BINS, dtype=torch.long)
        self.total = torch.zeros(shape)
        self.around = torch.zeros(*self._places.shape, len(self._window))

    def update(self, row: int, latents: Float[Tensor, "pos head d_latent"]) -> None:
        """Add the latents of a row."""
        latents = latents.cpu()
        self.total += latents.sum(0)
        token, head, latent = (latents > 0).nonzero(as_tuple=True)
        share = latents[token, head, latent] / self._largest[head, latent]
        bins = (share * N_BINS).long().clamp(max=N_BINS - 1)
        one = torch.ones_like(bins)
        self.histogram.index_put_((head, latent, bins), one, accumulate=True)
        here = self._places // self._width == row
        head, latent, rank = here.nonzero(as_tuple=True)
        spots = self._places[here][:, None] % self._width + self._window
        inside = (spots >= 0) & (spots < len(latents))
        spots = spots.clamp(0, len(latents) - 1)
        self.around[head, latent, rank] = latents[spots, head[:, None], latent[:, None]] * inside


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


@torch.no_grad()
def read_again(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    tops: TopTokens,
    *,
    context: int,
    keys: bool,
    batch_size: int = 16,
) -> tuple[dict[str, LatentStatistics], dict[str, KeyMeans]]:
    """Return the statistics of latents and, with `keys`, the mean key of tokens, by hook name.

    A latent's largest activation, which sets its bins, and its top tokens are known only after the
    first reading. Memory is that of the result, whatever the length of the texts.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name, as given to `top_tokens`.
        tops: what it found.
        context: tokens on either side of a top token.
        keys: also read the keys.
        batch_size: rows of one forward pass.
    """
    sites = {name: site for name, site in encoder_sites(saes).items() if name in tops.heads}
    found = {name: LatentStatistics(tops, name, context) for name in sites}
    means = {name: KeyMeans(tops.rows) for name in sites if keys}
    points = {name: key_hook(sites[name]) for name in means}
    for row, latents, others in latents_by_row(
        model,
        saes,
        tops.heads,
        tops.rows,
        skip=tops.bos,
        batch_size=batch_size,
        also=list(points.values()),
    ):
        for name, own in latents.items():
            found[name].update(row, own)
        for name, point in points.items():
            means[name].update(others[point], tops.rows[row][tops.rows[row] != PAD])
    return found, means


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
