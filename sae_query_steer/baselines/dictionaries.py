"""Control dictionaries: what a learned target owes to the training of its SAE."""

import copy
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from einops import rearrange

from sae_query_steer.arguments import check_kind
from sae_query_steer.sae.core import QueryHeadSAE, with_weights

ControlKind = Literal["random", "permuted"]


def control_dictionaries(
    saes: Mapping[str, QueryHeadSAE[Any]], kind: ControlKind, *, seed: int = 0
) -> dict[str, QueryHeadSAE[Any]]:
    """Return SAEs of equal size and architecture whose dictionaries know nothing of their heads.

    Learn targets over these as over the trained ones: what a trained SAE contributes is what it
    does better than both at equal sparsity and norm. d_sae rows a head span d_head dimensions many
    times over, so a few non-negative rows come near to any direction.

    Args:
        saes: trained SAEs by hook name.
        kind: "random": decoder rows drawn evenly from the sphere, each with the norm of the row in
            its place, and the encoder their transpose, as SAELens initialises them: an untrained
            SAE; "permuted": the trained rows and their encoder columns exchanged across the heads
            of a layer at random.
        seed: of the draws.

    Raises:
        TypeError: an encoder is no query-head SAE.
        ValueError: no such kind.

    Source: our choice.
    """
    if kind not in get_args(ControlKind):
        raise ValueError(f"kind must be one of {get_args(ControlKind)}, got {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, sae in saes.items():
        check_kind(f"the encoder at {name}", sae, QueryHeadSAE, "dictionaries are of SAEs")
        weights = {key: value.detach().cpu().clone() for key, value in sae.state_dict().items()}
        rows = weights["W_dec"]
        if kind == "random":
            drawn = torch.randn(rows.shape, generator=generator).to(rows)
            drawn *= rows.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
            weights |= {"W_dec": drawn, "W_enc": drawn.mT.contiguous()}
        else:
            order = torch.randperm(rows.shape[0] * rows.shape[1], generator=generator)
            weights["W_dec"] = rows.flatten(0, 1)[order].view_as(rows)
            columns = rearrange(weights["W_enc"], "h d l -> (h l) d")[order]
            weights["W_enc"] = rearrange(columns, "(h l) d -> h d l", h=len(rows)).contiguous()
            for key, value in weights.items():
                if value.shape == rows.shape[:2]:  # of each latent: biases, thresholds
                    weights[key] = value.flatten()[order].view_as(value)
        found[name] = with_weights(type(sae), copy.deepcopy(sae.cfg), weights, sae.W_dec.device)
    return found
