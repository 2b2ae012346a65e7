"""Take the fingerprint of a model with its encoders, and check centroids against it."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae_query_steer.arguments import check_kind, check_model
from sae_query_steer.models.fingerprint import (
    Fingerprint,
    check_queries,
    check_reconstructions,
    default_tolerance,
    dtype_name,
    fingerprint_tokens,
    read_fingerprint,
)
from sae_query_steer.sae.encoders import QueryEncoder, device_of, encoded, encoder_sites
from sae_query_steer.sites import check_hook_point
from sae_query_steer.targets.centroids import CentroidTargets


def take_fingerprint(model: Any, encoders: Mapping[str, QueryEncoder]) -> Fingerprint:
    """Return the fingerprint of a model and its encoders, taken without any hooks."""
    check_devices(model, encoders)
    queries = read_fingerprint(model, encoders)
    return Fingerprint(
        tokens=fingerprint_tokens(int(model.cfg.d_vocab)),
        queries={name: query.float().cpu() for name, query in queries.items()},
        reconstructions=reconstructions(encoders, queries),
        dtype=dtype_name(model),
    )


@torch.no_grad()
def reconstructions(
    encoders: Mapping[str, QueryEncoder], queries: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return decode(encode(queries)) of each encoder, on the CPU in 32 bits."""
    found = {}
    for name, encoder in encoders.items():
        latents = encoded(encoder, queries[name])
        with torch.autocast(latents.device.type, enabled=False):
            found[name] = encoder.decode(latents).float().cpu()
    return found


def check_belongs(model: Any, saes: Mapping[str, QueryEncoder], targets: CentroidTargets) -> None:
    """Raise unless centroids belong to this model and these encoders, by their fingerprint.

    Raises:
        ValueError: another model or another SAE; the message names the site.
    """
    check_devices(model, saes)
    stored = targets.fingerprint
    queries = read_fingerprint(model, saes, stored.tokens)
    tolerance = default_tolerance(dtype_name(model), stored.dtype)
    check_queries(stored, queries, tolerance=tolerance)
    device = next(iter(queries.values())).device
    same = {name: stored.queries[name].to(device) for name in saes}
    check_reconstructions(stored, reconstructions(saes, same), tolerance=tolerance)


def check_shapes(targets: CentroidTargets, saes: Mapping[str, QueryEncoder]) -> None:
    """Raise unless there are centroids for every encoder, of its heads and latents.

    Raises:
        ValueError: the message names the site.
    """
    for name, sae in saes.items():
        if name not in targets.means:
            raise ValueError(
                f"no centroids at {name}: there are some at {list(targets.means)}; build "
                "them with the same SAEs"
            )
        have, want = tuple(targets.means[name].shape[1:]), (sae.n_heads, sae.d_latent)
        if have != want:
            raise ValueError(
                f"centroids of another SAE at {name}: they are for {have[0]} heads of "
                f"{have[1]} latents, the SAE has {want[0]} heads of {want[1]}"
            )


def check_encoders(model: Any, encoders: Mapping[str, QueryEncoder]) -> None:
    """Raise unless a model has the hook point of every encoder.

    Raises:
        TypeError: no model of TransformerLens, or a value is not an encoder.
        ValueError: no encoders, no such hook point, or query heads other than the encoder's.
    """
    check_model(model)
    check_kind("saes", encoders, Mapping, "give SAEs by hook name, as train_query_saes returns")
    points = model.hook_dict
    others = {name for name in encoders if not re.search(r"\.attn\.hook_(rot_)?q$", name)}
    for name in others:
        check_hook_point(model, name, points)
    queries = {name: encoder for name, encoder in encoders.items() if name not in others}
    if queries or not others:
        for site in encoder_sites(queries).values():
            site.check(model, points)


def check_devices(model: Any, encoders: Mapping[str, QueryEncoder]) -> None:
    """Raise unless every encoder is on the device of its layer.

    Raises:
        ValueError: the message names both devices.
    """
    for name, encoder in encoders.items():
        here = next(model.blocks[int(name.split(".")[1])].parameters()).device
        there = device_of(encoder)
        if there is not None and there.type != here.type:
            raise ValueError(
                f"the SAE at {name} is on {there}, the layer on {here}: move it with "
                f"saes.to({str(here)!r})"
            )
