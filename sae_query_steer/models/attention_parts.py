"""Keys beside queries, and attention with queries changed, on both hosts."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.models.loading import check_eager, patterns_at
from sae_query_steer.sites import QuerySite


def key_hook(model: Any, site: QuerySite) -> str:
    """Return the hook point of the keys that a site's queries are compared with.

    Queries before rotary embedding go with keys before it, and those after it with those after it.

    Raises:
        ValueError: this architecture does not show them.
    """
    name = f"blocks.{site.layer}.attn.{'hook_rot_k' if site.rotated else 'hook_k'}"
    if name not in model.hook_dict:
        raise ValueError(
            f"no hook point {name}: this architecture does not expose its keys; pass n_keys=0"
        )
    return name


@torch.no_grad()
def queries_and_keys_at(
    model: Any, tokens: Int[Tensor, "batch pos"], sites: Sequence[QuerySite], *, keys: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return queries and keys at several sites from one forward pass that stops after the last.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: rows, padded on the right or not at all.
        sites: the sites.
        keys: False leaves the keys out.

    Returns:
        Queries [batch pos head d_head] and keys [batch pos key_head d_head], by the sites' hook
        names. Under grouped-query attention key heads are fewer: query head h reads key head
        h // (n_heads / n_key_heads).
    """
    of_keys = {site.hook_name: key_hook(model, site) for site in sites if keys}
    names = [site.hook_name for site in sites]
    cache = model.run_with_cache(
        tokens.to(model.cfg.device),
        names_filter=[*names, *of_keys.values()],
        stop_at_layer=max(site.layer for site in sites) + 1,
        prepend_bos=False,
    )[1]
    d_head = int(model.cfg.d_head)
    # Some hosts keep the heads flat.
    found = {n: cache[n].reshape(*tokens.shape, -1, d_head) for n in [*names, *of_keys.values()]}
    return {n: found[n] for n in names}, {n: found[key] for n, key in of_keys.items()}


def key_head(head: int, n_heads: int, n_key_heads: int) -> int:
    """Return the key head that a query head reads."""
    return head // (n_heads // n_key_heads)


@torch.no_grad()
def patterns_with_change(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    site: QuerySite,
    change: Float[Tensor, "batch pos head d_head"],
) -> Float[Tensor, "batch head query key"]:
    """Return the attention pattern of a site's layer where something is added to its queries.

    A token's queries decide nothing but where this token looks, so every token and head of a row
    may have a change of its own. Nothing is left behind.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: rows, padded on the right or not at all.
        site: the site.
        change: what is added.

    Raises:
        ValueError: the model is compiled, or does not show its attention.
    """
    check_eager(model)

    def add(query: Tensor, hook: Any) -> Tensor:
        del hook  # its name differs between the hosts
        return query + change.to(query).reshape(query.shape)

    with model.hooks(fwd_hooks=[(site.hook_name, add)]):
        return patterns_at(model, tokens, [site.layer])[site.layer]
