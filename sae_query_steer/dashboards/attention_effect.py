"""Where a head looks because of one latent: its attention with the latent on and off."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.diagnostics.latent_texts import TopTokens
from sae_query_steer.diagnostics.moved import decoder_rows
from sae_query_steer.models.activations import pattern_hook, read_activations
from sae_query_steer.progress import progress_bar
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.sites import QuerySite

PATTERN_AT_ONCE = 2**24
"""Numbers of an attention pattern that are held together: 64 MiB in 32 bits."""


@dataclass(frozen=True)
class Look:
    """Where a head looks at one of a latent's top tokens, with the latent and without."""

    moved: float
    """Share of the head's attention that goes elsewhere without the latent (total variation)."""

    sources: list[tuple[int, float, float]]
    """Position of the tokens with the largest changes, attention to it with and without."""


@torch.no_grad()
def attention_effect(
    model: Any,
    site: QuerySite,
    encoder: QueryEncoder,
    tops: TopTokens,
    *,
    n_tokens: int,
    n_sources: int = 6,
    batch_size: int = 16,
) -> dict[tuple[int, int, int], Look]:
    """Return the attention of each latent's head at its top tokens, with the latent and without.

    Without latent i, at activation z_i, the query is q - z_i w_i with w_i its decoder row, so that
    the SAE's error stays. The model itself computes the attention, so rotary embedding, soft caps,
    windows and shared keys are what they are. A token's query decides nothing but where that token
    looks, so one forward pass of a row switches one latent off at every token and head.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        site: the site.
        encoder: its SAE.
        tops: what `top_tokens` found there.
        n_tokens: top tokens of each latent to look at, 1 to its k.
        n_sources: source tokens to keep of each.
        batch_size: rows of a forward pass, at most.

    Returns:
        By index of the head in `tops.heads`, latent and rank of the top token.

    Source: our choice.
    """
    heads, width = tops.heads[site.hook_name], tops.rows.shape[1]
    places = tops.places[site.hook_name][..., :n_tokens]
    directions = decoder_rows(encoder, heads).float().cpu()
    found: dict[tuple[int, int, int], Look] = {}
    with progress_bar(
        total=int((places >= 0).sum()), desc="Switching latents off", unit="latent"
    ) as bar:
        for own in _passes(places, width, site.n_heads, batch_size):
            head, latent, rank, position = torch.tensor(
                own[["head", "latent", "rank", "position"]].to_numpy()
            ).T
            copies = own.groupby(["row", "copy"])
            copy = torch.tensor(copies.ngroup().to_numpy())
            # Attention is causal: what stands behind the last of these tokens decides nothing.
            rows = tops.rows[copies["row"].first().tolist(), : int(position.max()) + 1]
            index = torch.tensor(heads)[head]
            change = torch.zeros(*rows.shape, site.n_heads, site.d_head)
            activation = tops.activations[site.hook_name][head, latent, rank, None]
            change[copy, position, index] = -activation * directions[head, latent]
            on, off = (
                _pattern(model, rows, site, added)[copy, index, position]
                for added in (torch.zeros_like(change), change)
            )
            difference = (on - off).abs()
            most = difference.topk(min(n_sources, difference.shape[-1]), dim=-1)
            columns = (most.indices, on.gather(-1, most.indices), off.gather(-1, most.indices))
            keys = zip(head.tolist(), latent.tolist(), rank.tolist(), strict=True)
            for i, key in enumerate(keys):
                seen = most.values[i] > 0
                sources = zip(*(column[i, seen].tolist() for column in columns), strict=True)
                found[key] = Look(float(difference[i].sum()) / 2, list(sources))
            bar.update(len(own))
    return found


def _passes(places: Tensor, width: int, n_heads: int, batch_size: int) -> list[pd.DataFrame]:
    """Return the latents that each forward pass switches off, in copies of rows.

    In no copy of a row two latents share a token and head.
    """
    jobs = pd.DataFrame((places >= 0).nonzero().numpy(), columns=["head", "latent", "rank"])
    place = places[places >= 0].numpy()
    jobs["row"], jobs["position"] = place // width, place % width
    jobs["copy"] = jobs.groupby(["row", "position", "head"]).cumcount()
    at_once = max(1, min(batch_size, PATTERN_AT_ONCE // (n_heads * width**2)))
    number = jobs.groupby(["row", "copy"]).ngroup() // at_once
    return [own for _, own in jobs.groupby(number)]


def _pattern(
    model: Any, rows: Tensor, site: QuerySite, added: Float[Tensor, "batch pos head d_head"]
) -> Float[Tensor, "batch head query key"]:
    """Return the attention pattern of a site's layer with something added to its queries."""

    def add(query: Tensor, hook: Any) -> Tensor:
        del hook  # its name differs between the backends
        return query + added.to(query).reshape(query.shape)

    name = pattern_hook(site.layer)
    read = read_activations(model, rows, [name], fwd_hooks=[(site.hook_name, add)])
    return read[name].float().cpu()
