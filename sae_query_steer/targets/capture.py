"""Take the fingerprint of a model and its encoders."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae_query_steer.models.activations import read_activations, without_hooks
from sae_query_steer.models.fingerprint import Fingerprint, dtype_name, fingerprint_tokens
from sae_query_steer.sae.encoders import QueryEncoder, device_of, encoded, encoder_sites


def take_fingerprint(model: Any, encoders: Mapping[str, QueryEncoder]) -> Fingerprint:
    """Return the fingerprint of a model and its encoders, taken with all hooks set aside."""
    check_devices(model, encoders)
    tokens = fingerprint_tokens(int(model.cfg.d_vocab))
    with without_hooks(model):
        queries = read_activations(model, tokens, list(encoders))
    return Fingerprint(
        tokens=tokens,
        queries={name: query.float().cpu() for name, query in queries.items()},
        reconstructions=reconstructions(encoders, queries),
        dtype=dtype_name(model),
    )


@torch.no_grad()
def reconstructions(
    encoders: Mapping[str, QueryEncoder], queries: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return decode(encode(queries)) of each encoder, on the CPU in 32 bits."""
    return {
        name: encoder.decode(encoded(encoder, queries[name])).float().cpu()
        for name, encoder in encoders.items()
    }


def check_devices(model: Any, encoders: Mapping[str, QueryEncoder]) -> None:
    """Raise unless every encoder lies on the device of its layer.

    Raises:
        ValueError: the message names both devices.
    """
    for name, site in encoder_sites(encoders).items():
        here = next(model.blocks[site.layer].parameters()).device
        there = device_of(encoders[name])
        if there is not None and there.type != here.type:
            raise ValueError(
                f"the SAE at {name} is on {there}, the layer on {here}: move it with "
                f"saes.to({str(here)!r})"
            )
