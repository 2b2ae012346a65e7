"""Run a model with its queries replaced by what their SAEs reconstruct, head by head.

SAELens's own `model.add_sae` is not made for one head. It puts the SAE in the place of the hook
point and calls it with the whole activation [batch pos head d_head]; `metadata.hook_head_index` is
read by SAELens's store and evals, and by nothing there. The SAE of one head, whose d_in is d_head,
fits the last axis of every head: so `add_sae` rewrites all heads with the SAE of that one, without
a warning. (A query-head SAE takes the same activation as what it is, and rewrites each head with
its own.) While an SAE is so attached, the hook point is gone, and with it the hooks on it.

Here the hook point stays, and heads that are not chosen are bitwise as they were.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_query_steer.models.activations import hooks_aside
from sae_query_steer.models.placed_hooks import Hook
from sae_query_steer.models.tracking import PositionTracker
from sae_query_steer.sae.encoders import QueryEncoder, encoder_sites
from sae_query_steer.steering.block import block
from sae_query_steer.steering.engine import by_head
from sae_query_steer.steering.where import SiteHeads, chosen_heads
from sae_query_steer.targets.fingerprint import check_devices


@block
def attached_saes(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    error_term: bool = False,
) -> Iterator[None]:
    """Replace the queries of the chosen heads by their reconstruction, for a `with` block.

    At every position of every forward pass:

        query[..., h, :] = decode(encode(query))[..., h, :] (+ error[..., h, :])

    Works in plain forward passes, `run_with_cache`, and in `generate` with the KV cache on and off,
    beside other hooks: on the same hook point, hooks placed before see the query as it was, hooks
    and steerers placed inside the block see the reconstruction. The latents are seen and changed by
    hooks on the SAE itself, `saes[name].hooks([("hook_sae_acts_post", hook)])`; they are
    [batch pos head d_latent], for all heads of the layer, and those of chosen heads count.

    Args:
        model: a HookedTransformer, a HookedSAETransformer or a TransformerBridge.
        saes: the SAEs by hook name, on the device of their layers.
        layers: which of their layers; None means all.
        heads: the same heads in each of these layers, or heads by layer; None means all.
        error_term: add what the reconstruction misses, `query - decode(encode(query))`, as a
            constant without gradient. The model then computes what it computes bare, up to
            rounding, and the query depends on the latents alone: gradients by a latent, or what a
            hook does to it, count, and the SAE's error does not. The error is that of latents as
            they are without hooks, as in SAELens.

    Raises:
        TypeError: a value of `saes` is no encoder, or `layers` or `heads` is no list.
        ValueError: the model has no such site or other heads there, `saes` has no such layer or
            head, an SAE is on another device, or SAELens's `add_sae` holds the hook point; always
            before the first hook is placed.

    Source: splicing as in SAELens's `add_sae`; one head at a time is our choice.
    """
    sites = encoder_sites(saes)
    chosen = chosen_heads(sites, layers, heads)
    for name in chosen:
        sites[name].check(model)
    check_devices(model, {name: saes[name] for name in chosen})
    hooks = [
        (name, _hook(saes[name], SiteHeads(sites[name], picked), error_term))
        for name, picked in chosen.items()
    ]
    tracker = PositionTracker(model, [sites[name].layer for name in chosen])
    with tracker.attached(hooks):
        yield


def _hook(encoder: QueryEncoder, at: SiteHeads, error_term: bool) -> Hook:
    def replace(activation: Tensor, hook: Any) -> Tensor:
        del hook  # its name differs between the backends
        queries = by_head(activation, at)
        output = encoder.decode(encoder.encode(queries))
        if error_term:
            own = getattr(encoder, "hook_dict", {}).values()
            with torch.no_grad(), hooks_aside(own):
                error = queries - encoder.decode(encoder.encode(queries))
            output = output + error
        index = torch.tensor(at.heads, device=queries.device)
        replaced = queries.index_copy(2, index, output[:, :, index].to(queries.dtype))
        return replaced.reshape(activation.shape)

    vars(replace)["steers_queries"] = True  # read by models.loading.check_not_steered
    return replace
