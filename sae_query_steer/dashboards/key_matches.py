"""Which tokens' keys a latent's decoder direction matches."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.data.batches import PAD
from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sae.encoders import QueryEncoder, at_heads, decoded_difference, device_of

MIN_SEEN = 3
"""Tokens of an id that a mean key is taken of, at least: of one alone it would be its context's."""

MAX_IDS = 8192
"""Ids whose mean key is kept, the commonest: 64 MiB for 8 key heads of 128."""

SCORES_AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyMatches:
    """The token ids whose keys match the latents of some heads best."""

    ids: Int[Tensor, "head d_latent n"]
    """Token ids, the best match first."""

    scores: Float[Tensor, "head d_latent n"]
    """What one unit of the latent adds to the attention logit of such a token, beyond that of a
    mean key."""


class KeyMeans:
    """Streams the mean key of every token id that the texts have often enough.

    Args:
        rows: the texts' token ids; -1 is padding.
        min_seen: tokens of an id, at least; where no id has as many, 1.
        max_ids: ids at most, the commonest.
    """

    def __init__(
        self, rows: Int[Tensor, "row pos"], min_seen: int = MIN_SEEN, max_ids: int = MAX_IDS
    ) -> None:
        ids, counts = rows[rows != PAD].unique(return_counts=True)
        often = counts >= (min_seen if int(counts.max()) >= min_seen else 1)
        ids, counts = ids[often], counts[often]
        commonest = counts.argsort(descending=True, stable=True)[:max_ids].sort().values
        self.ids = ids[commonest]
        self.counts = torch.zeros(len(self.ids), dtype=torch.long)
        self._sums: Tensor | None = None
        self._total: Tensor | None = None
        self._n = 0

    def update(self, keys: Float[Tensor, "token key_head d_head"], tokens: Tensor) -> None:
        """Add the keys of some tokens."""
        keys = keys.cpu().double()
        if self._sums is None or self._total is None:
            self._sums = keys.new_zeros(len(self.ids), *keys.shape[1:])
            self._total = keys.new_zeros(keys.shape[1:])
        index = torch.searchsorted(self.ids, tokens).clamp(max=len(self.ids) - 1)
        known = self.ids[index] == tokens
        self._sums.index_add_(0, index[known], keys[known])
        self.counts += torch.bincount(index[known], minlength=len(self.ids))
        self._total += keys.sum(0)
        self._n += len(keys)

    def beyond_mean(self) -> Float[Tensor, "id key_head d_head"]:
        """Return the mean key of each id, less the mean of all keys, which attention can't see."""
        if self._sums is None or self._total is None:
            raise ValueError("no keys were read: call update first")
        return self._sums / self.counts[:, None, None] - self._total / self._n


@torch.no_grad()
def key_matches(
    means: KeyMeans,
    encoder: QueryEncoder,
    heads: tuple[int, ...],
    *,
    n: int,
) -> KeyMatches:
    """Return for each latent the token ids with the largest dot product of decoder row and key.

    With w the decoder row and k_t the mean key of token id t in the texts:

        score_t = <w, k_t - mean over all tokens of k> / sqrt(d_head)

    A number that is the same for every key changes no attention, so the mean is taken off. Keys
    and decoder rows are taken as they are at the site. At `hook_q` that is before rotary embedding:
    a match of content, as at distance 0, blind to how far apart the tokens stand. (The attention
    with the latent on and off, beside it, knows the distance.) At `hook_rot_q` positions are mixed
    in on both sides.

    Args:
        means: of the keys of this site's layer.
        encoder: the SAE of all heads.
        heads: of which heads.
        n: ids of each latent; fewer where fewer have a mean.

    Source: our choice.
    """
    directions = decoder_directions(encoder, heads).float().cpu()
    keys = means.beyond_mean().float()
    n = min(n, len(keys))
    at_once = max(1, SCORES_AT_ONCE // len(keys))
    ids, scores = [], []
    for head, rows in zip(heads, directions, strict=True):
        own = keys[:, head // (encoder.n_heads // keys.shape[1])]
        best = [(part @ own.T).topk(n, dim=-1) for part in rows.split(at_once)]
        ids.append(means.ids[torch.cat([part.indices for part in best])])
        scores.append(torch.cat([part.values for part in best]) / encoder.d_head**0.5)
    return KeyMatches(ids=torch.stack(ids), scores=torch.stack(scores))


@torch.no_grad()
def decoder_directions(
    encoder: QueryEncoder, heads: tuple[int, ...]
) -> Float[Tensor, "head d_latent d_head"]:
    """Return what one unit of each latent of some heads adds to the query."""
    if isinstance(encoder, QueryHeadSAE):
        return encoder.W_dec.detach()[list(heads)]
    device = device_of(encoder) or torch.device("cpu")
    some, units = at_heads(encoder, heads, device), torch.eye(encoder.d_latent, device=device)
    parts = []
    for one in units.split(max(1, SCORES_AT_ONCE // (len(heads) * encoder.d_latent))):
        after = one[:, None].expand(-1, len(heads), -1).contiguous()
        parts.append(decoded_difference(some, after, torch.zeros_like(after)))
    return torch.cat(parts).transpose(0, 1)
