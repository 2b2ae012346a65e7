"""What a second reading of the texts tells of every latent, once its top tokens are known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.dashboards.key_matches import KeyMeans
from sae_query_steer.data.batches import row_batches
from sae_query_steer.diagnostics.active_tokens import TopTokens
from sae_query_steer.diagnostics.latent_texts import LATENTS_AT_ONCE
from sae_query_steer.models.activations import check_finite, key_hook, read_activations
from sae_query_steer.sae.encoders import QueryEncoder, at_heads, device_of, encoder_sites

N_BINS = 24
"""Bins of a histogram."""

PAIRS_AT_ONCE = 2**23
"""Firings times top tokens that are compared together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentStatistics:
    """How the latents of some heads of a site fire over the texts."""

    histogram: Int[Tensor, "head d_latent bin"]
    """Tokens by activation: equal bins from 0 to the latent's largest activation."""

    mean: Float[Tensor, "head d_latent"]
    """Mean activation over all tokens that count, those at which it is silent too."""

    around: Float[Tensor, "head d_latent k window"]
    """Activations at the tokens around each top token, which stands in the middle; 0 where silent,
    and beyond the ends of its text."""


def read_again(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    tops: TopTokens,
    *,
    context: int,
    keys: bool,
    ignore_bos: bool = True,
    batch_size: int = 16,
    n_bins: int = N_BINS,
) -> tuple[dict[str, LatentStatistics], dict[str, KeyMeans]]:
    """Return histograms, means and the activations around top tokens, and the mean key of tokens.

    The texts are read twice in all: a latent's largest activation, which sets its bins, and its top
    tokens, around which it is looked at, are known after the first reading only. Bins that are
    fixed beforehand would have to be logarithmic, and merging windows as the top changes costs more
    than the second forward pass. Memory is that of the result, whatever the length of the texts.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name, as given to `top_tokens`.
        tops: what it found.
        context: tokens on either side of a top token.
        keys: also read the keys.
        ignore_bos: as in `top_tokens`.
        batch_size: rows of one forward pass.
        n_bins: bins of a histogram.

    Returns:
        The statistics, and with `keys` the mean keys, by hook name.

    Raises:
        ValueError: a query is not finite.

    Source: our choice.
    """
    sites = [site for name, site in encoder_sites(saes).items() if name in tops.heads]
    readers = {
        site.hook_name: _Reader(saes[site.hook_name], tops, site.hook_name, context, n_bins)
        for site in sites
    }
    means = {site.hook_name: KeyMeans(tops.rows) for site in sites if keys}
    bos = tops.tokenizer.bos_token_id if ignore_bos else None
    names = {site.hook_name: key_hook(site) for site in sites}
    wanted = [*names, *(names.values() if keys else ())]
    for start, tokens, real in row_batches(tops.rows, batch_size, "Reading histograms"):
        counted = real if bos is None else real & (tokens != bos)
        row, position = counted.nonzero(as_tuple=True)
        places = (start + row) * tops.rows.shape[1] + position
        found = read_activations(model, tokens, wanted)
        for name in names:
            query = found[name]
            check_finite(query, name)
            here = query[row.to(query.device), position.to(query.device)]
            readers[name].update(here[:, list(tops.heads[name])], places)
            if keys:
                key = found[names[name]]
                means[name].update(key[real.to(key.device)], tokens[real])
    return {name: reader.result(tops.n_tokens) for name, reader in readers.items()}, means


class _Reader:
    """Counts what the latents of some heads of a site do, which are its units here."""

    def __init__(
        self, encoder: QueryEncoder, tops: TopTokens, name: str, context: int, n_bins: int
    ) -> None:
        device = device_of(encoder) or torch.device("cpu")
        self._encoder = at_heads(encoder, tops.heads[name], device)
        self._largest = tops.activations[name][..., 0].flatten().to(device)
        self._places = tops.places[name].flatten(0, 1).to(device)
        self._shape = tops.places[name].shape
        self._width, self._context, self._n_bins = tops.rows.shape[1], context, n_bins
        n_units, k = self._places.shape
        self._histogram = torch.zeros(n_units * n_bins, dtype=torch.long, device=device)
        self._sums = torch.zeros(n_units, device=device)
        self._around = torch.zeros(n_units, k, 2 * context + 1, device=device)

    def update(self, queries: Float[Tensor, "token head d_head"], places: Tensor) -> None:
        at_once = max(1, LATENTS_AT_ONCE // len(self._places))
        device = self._places.device
        for own, where in zip(queries.split(at_once), places.split(at_once), strict=True):
            latents = self._encoder.encode(own.to(device)).float().flatten(1)
            token, unit = (latents > 0).nonzero(as_tuple=True)
            value = latents[token, unit]
            share = (value / self._largest[unit]).clamp(max=1)
            bins = (share * self._n_bins).long().clamp(max=self._n_bins - 1)
            self._histogram += torch.bincount(
                unit * self._n_bins + bins, minlength=len(self._histogram)
            )
            self._sums.index_add_(0, unit, value)
            self._note(unit, where.to(device)[token], value)

    def result(self, n_tokens: int) -> LatentStatistics:
        head, latent, k = self._shape
        return LatentStatistics(
            histogram=self._histogram.view(head, latent, -1).cpu(),
            mean=(self._sums / max(1, n_tokens)).view(head, latent).cpu(),
            around=self._around.view(head, latent, k, -1).cpu(),
        )

    def _note(self, unit: Tensor, place: Tensor, value: Tensor) -> None:
        """Keep the firings that lie around a top token of their latent, in its text."""
        at_once = max(1, PAIRS_AT_ONCE // self._places.shape[1])
        parts: Sequence[tuple[Tensor, ...]] = list(
            zip(unit.split(at_once), place.split(at_once), value.split(at_once), strict=True)
        )
        for units, where, values in parts:
            tops = self._places[units]
            offset = where[:, None] - tops
            near = (offset.abs() <= self._context) & (tops >= 0)
            near &= where[:, None] // self._width == tops // self._width
            firing, rank = near.nonzero(as_tuple=True)
            column = offset[firing, rank] + self._context
            self._around[units[firing], rank, column] = values[firing]
