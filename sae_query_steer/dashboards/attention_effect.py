"""Where a head looks because of one latent: its attention with the latent on and off."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_query_steer.dashboards.key_matches import decoder_directions
from sae_query_steer.diagnostics.active_tokens import TopTokens
from sae_query_steer.models.activations import pattern_hook, read_activations
from sae_query_steer.models.loading import check_eager
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.sites import QuerySite

PATTERN_AT_ONCE = 2**24
"""Numbers of an attention pattern that are held together: 64 MiB in 32 bits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionEffect:
    """The attention that each latent of some heads moves at its first top tokens."""

    moved: Float[Tensor, "head d_latent rank"]
    """Share of the head's attention that goes elsewhere without the latent (total variation)."""

    positions: Int[Tensor, "head d_latent rank source"]
    """Source tokens with the largest changes, by position in the text; -1 where there are fewer."""

    on: Float[Tensor, "head d_latent rank source"]
    """Attention to them as it is."""

    off: Float[Tensor, "head d_latent rank source"]
    """Attention to them with the latent at 0."""


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
) -> AttentionEffect:
    """Return the attention of each latent's head at its top tokens, with the latent and without.

    Without latent i, at activation z_i, the query is q - z_i w_i with w_i its decoder row: the
    difference of two decodings, so that the SAE's error stays. The model itself computes the
    attention, so rotary embedding, soft caps, windows and shared keys are what they are.

    A token's query decides nothing but where that token looks. So one forward pass of a row
    switches one latent off at every token and head; a row is read as often as the most latents
    share a token and head of it.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        site: the site.
        encoder: its SAE.
        tops: what `top_tokens` found there.
        n_tokens: top tokens of each latent to look at, 1 to its k.
        n_sources: source tokens to keep of each.
        batch_size: rows of a forward pass, at most.

    Source: our choice.
    """
    heads = tops.heads[site.hook_name]
    places = tops.places[site.hook_name][..., :n_tokens]
    values = tops.activations[site.hook_name][..., :n_tokens]
    directions = decoder_directions(encoder, heads)
    width, shape = tops.rows.shape[1], (*places.shape, n_sources)
    moved = torch.zeros(places.shape)
    positions = torch.full(shape, -1)
    on, off = torch.zeros(shape), torch.zeros(shape)
    jobs = _jobs(places, width)
    batches = _batches(jobs, tops, site.n_heads, batch_size)
    pattern = pattern_hook(site.layer)
    with tqdm(total=len(jobs.index), desc=f"Attention, layer {site.layer}", unit="latent") as bar:
        for part in batches:
            head, latent, rank = jobs.index[part].unbind(-1)
            place = places[head, latent, rank]
            position, copy = place % width, jobs.copy[part] - int(jobs.copy[part][0])
            rows = jobs.row_of_copy[jobs.copy[part].unique()]
            # Attention is causal: what stands behind the last of these tokens decides nothing.
            tokens = tops.rows[rows, : int(position.max()) + 1].clamp(min=0)
            index = torch.tensor(heads)[head]
            change = torch.zeros(*tokens.shape, site.n_heads, site.d_head)
            step = values[head, latent, rank, None] * directions[head, latent].float().cpu()
            change[copy, position, index] = -step
            distinct, of_distinct = rows.unique(return_inverse=True)
            first = torch.zeros_like(distinct).scatter_(0, of_distinct, torch.arange(len(rows)))
            plain = read_activations(model, tokens[first], [pattern])[pattern]
            without = _pattern_with_change(model, tokens, site, change)
            before = _looking(plain, of_distinct[copy], index, position)
            after = _looking(without, copy, index, position)
            n = min(n_sources, before.shape[-1])
            difference = (before - after).abs()
            most = difference.topk(n, dim=-1)
            seen = most.values > 0
            moved[head, latent, rank] = difference.sum(-1) / 2
            spot = head, latent, rank
            positions[(*spot, slice(n))] = torch.where(seen, most.indices, -1)
            on[(*spot, slice(n))] = before.gather(-1, most.indices) * seen
            off[(*spot, slice(n))] = after.gather(-1, most.indices) * seen
            bar.update(len(part))
    return AttentionEffect(moved=moved, positions=positions, on=on, off=off)


def _pattern_with_change(
    model: Any, tokens: Tensor, site: QuerySite, change: Float[Tensor, "batch pos head d_head"]
) -> Float[Tensor, "batch head query key"]:
    """Return the attention pattern of a site's layer with something added to its queries."""
    check_eager(model)

    def add(query: Tensor, hook: Any) -> Tensor:
        del hook  # its name differs between the backends
        return query + change.to(query).reshape(query.shape)

    name = pattern_hook(site.layer)
    return read_activations(model, tokens, [name], fwd_hooks=[(site.hook_name, add)])[name]


def _looking(
    pattern: Float[Tensor, "batch head query key"], row: Tensor, head: Tensor, position: Tensor
) -> Float[Tensor, "token key"]:
    """Return where single tokens look, on the CPU: the rest of a pattern stays where it is."""
    device = pattern.device
    return pattern[row.to(device), head.to(device), position.to(device)].float().cpu()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Jobs:
    """Latents to switch off, ordered by the copy of the row in which each is switched off."""

    index: Int[Tensor, "job 3"]
    """Index of the head, latent, rank."""

    copy: Int[Tensor, " job"]
    """Which copy of a row; in no copy two latents share a token and head."""

    row_of_copy: Int[Tensor, " copy"]
    """Which row each copy is of."""


def _jobs(places: Int[Tensor, "head d_latent rank"], width: int) -> _Jobs:
    index = (places >= 0).nonzero()
    place = places[tuple(index.unbind(-1))]
    where = place * len(places) + index[:, 0]
    order = where.argsort(stable=True)
    ordered = where[order]
    # The how manieth latent of its token and head.
    slot = torch.empty_like(where)
    slot[order] = torch.arange(len(where)) - torch.searchsorted(ordered, ordered)
    n_slots = int(slot.max()) + 1 if len(slot) else 1
    copies, copy = (place // width * n_slots + slot).unique(return_inverse=True)
    order = copy.argsort(stable=True)
    return _Jobs(index=index[order], copy=copy[order], row_of_copy=copies // n_slots)


def _batches(jobs: _Jobs, tops: TopTokens, n_heads: int, batch_size: int) -> list[Tensor]:
    """Return the jobs of each forward pass: all of some copies, few enough for the memory."""
    if not len(jobs.index):
        return []
    at_once = max(1, min(batch_size, PATTERN_AT_ONCE // (n_heads * tops.rows.shape[1] ** 2)))
    batch = jobs.copy // at_once
    return list(torch.arange(len(batch)).split(torch.bincount(batch).tolist()))
