"""Find the tokens at which latents are most active, for all latents in one pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.data.batches import row_batches
from sae_query_steer.data.token_rows import Texts, token_rows
from sae_query_steer.data.tokenized import tokenizer_of
from sae_query_steer.diagnostics.active_tokens import TopTokens
from sae_query_steer.models.activations import read_activations
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.sae.encoders import QueryEncoder, at_heads, device_of, encoder_sites
from sae_query_steer.steering.where import chosen_heads
from sae_query_steer.targets.fingerprint import check_devices

LATENTS_AT_ONCE = 2**24
"""Activations encoded together: 64 MiB in 32 bits."""


@torch.no_grad()
def top_tokens(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    texts: Texts,
    *,
    k: int = 10,
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    n_tokens: int | None = None,
    ignore_bos: bool = True,
    batch_size: int = 16,
    **reading: Any,
) -> TopTokens:
    """Return the k tokens at which each latent of each head is most active, in one pass.

    Memory grows with latents times k, not with the texts (whose ids are kept, 32 bits a token). Of
    tokens with equal activations the earlier counts as the more active.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name.
        texts: in any form that `token_rows` takes.
        k: tokens of each latent, 1 or more.
        heads: which heads: the same in each layer, or by layer; None means all.
        n_tokens: about how many tokens to read, in whole rows; None means all.
        ignore_bos: leave out BOS, which has the same activations at the start of every text.
        batch_size: rows of one forward pass.
        reading: options of `token_rows`; by default every text stays whole.

    Returns:
        The tokens, on the CPU; `table` shows them with the text around them.

    Raises:
        ValueError: a number below 1, a site, head or layer that does not exist, unusable texts, an
            SAE on another device, or a model that is being steered.
    """
    if k < 1 or batch_size < 1 or (n_tokens is not None and n_tokens < 1):
        raise ValueError(
            f"k, batch_size and n_tokens must be 1 or more, got k={k}, batch_size={batch_size} and "
            f"n_tokens={n_tokens}"
        )
    sites = encoder_sites(saes)
    for site in sites.values():
        site.check(model)
    picked = chosen_heads(sites, None, heads)
    check_devices(model, saes)
    check_not_steered(model)
    tokenizer = tokenizer_of(model)
    reading.setdefault("concat_sequences", False)
    if not reading["concat_sequences"] and reading.get("context_size") is None:
        reading["context_size"] = int(model.cfg.n_ctx)
    rows = token_rows(model, texts, **reading).long()
    if n_tokens is not None:
        rows = rows[: max(1, n_tokens // rows.shape[1])]
    found = {name: _TopK(saes[name], some, k) for name, some in picked.items()}
    n_read = 0
    for start, tokens, real in row_batches(rows, batch_size, "Reading latents"):
        counted = real & (tokens != tokenizer.bos_token_id) if ignore_bos else real
        row, position = counted.nonzero(as_tuple=True)
        n_read += len(row)
        places = (start + row) * rows.shape[1] + position
        for name, queries in read_activations(model, tokens, list(found)).items():
            here = queries[row.to(queries.device), position.to(queries.device)]
            found[name].update(here[:, list(picked[name])], places)
    return TopTokens(
        rows=rows,
        heads=picked,
        activations={name: top.values.cpu() for name, top in found.items()},
        places={name: top.places.cpu() for name, top in found.items()},
        n_fired={name: top.n_fired.cpu() for name, top in found.items()},
        n_tokens=n_read,
        tokenizer=tokenizer,
    )


def top_activating_texts(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    texts: Texts,
    hook_name: str,
    head: int,
    latents: Sequence[int] | None = None,
    *,
    k: int = 10,
    context: int = 10,
    **reading: Any,
) -> pd.DataFrame:
    """Return `TopTokens.table` for latents of one head.

    For latents of several heads call `top_tokens` once, and its `table` for each.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name.
        texts: in any form that `token_rows` takes.
        hook_name: the site.
        head: the head.
        latents: which; None means all that fire.
        k: tokens of each latent.
        context: tokens of text on either side.
        reading: further options of `top_tokens`.

    Raises:
        ValueError: as `top_tokens` and `TopTokens.table`.
    """
    if hook_name not in saes:
        raise ValueError(f"no SAE at {hook_name}: there is one at {sorted(saes)}")
    found = top_tokens(model, {hook_name: saes[hook_name]}, texts, k=k, heads=[head], **reading)
    return found.table(hook_name, head, latents, context=context)


class _TopK:
    """The k largest activations above 0 so far of every latent of some heads of a site."""

    def __init__(self, encoder: QueryEncoder, heads: Sequence[int], k: int) -> None:
        device = device_of(encoder) or torch.device("cpu")
        self._encoder = at_heads(encoder, heads, device)
        shape = (len(heads), encoder.d_latent)
        self.values = torch.zeros(*shape, k, device=device)
        self.places = torch.full((*shape, k), -1, device=device)
        self.n_fired = torch.zeros(shape, dtype=torch.long, device=device)

    def update(self, queries: Float[Tensor, "token head d_head"], places: Tensor) -> None:
        at_once = max(1, LATENTS_AT_ONCE // self.n_fired.numel())
        device = self.values.device
        for own, where in zip(queries.split(at_once), places.split(at_once), strict=True):
            latents = self._encoder.encode(own.to(device)).float()
            self.n_fired += (latents > 0).sum(0)
            self._merge(latents.flatten(1), where.to(device))

    def _merge(self, latents: Float[Tensor, "token latent"], places: Tensor) -> None:
        """Merge the activations that exceed the last of a latent's k."""
        k = self.values.shape[-1]
        values, kept = self.values.view(-1, k), self.places.view(-1, k)
        token, latent = (latents > values[:, -1]).nonzero(as_tuple=True)
        touched = latent.unique()
        # Old ones first, then in the order of the texts: stable sorts keep equals so.
        value = torch.cat([values[touched].flatten(), latents[token, latent]])
        place = torch.cat([kept[touched].flatten(), places[token]])
        latent = torch.cat([touched.repeat_interleave(k), latent])
        order = value.argsort(descending=True, stable=True)
        order = order[latent[order].argsort(stable=True)]
        value, place, latent = value[order], place[order], latent[order]
        rank = torch.arange(len(latent), device=latent.device)
        rank -= torch.searchsorted(latent, latent)
        best = rank < k
        values[latent[best], rank[best]] = value[best]
        kept[latent[best], rank[best]] = place[best]
