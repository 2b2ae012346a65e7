"""Start of training from the weights of given SAEs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sae_lens.registry import get_sae_training_class

from sae_query_steer.config import Architecture
from sae_query_steer.sae.core import PerHead, QueryHeadSAE, QueryHeadTrainingSAE
from sae_query_steer.sites import QuerySite


def check_start(
    start: Mapping[str, QueryHeadSAE[Any]], settings: Architecture, sites: Sequence[QuerySite]
) -> None:
    """Raise unless training of some sites may start from inference SAEs.

    Raises:
        ValueError: the message names the site, and what differs with both values.
    """
    made: Any = get_sae_training_class(settings.name)[1]
    for site in sites:
        name = site.hook_name
        if name not in start:
            raise ValueError(f"start must have an SAE at each site, got none at {name}")
        given = start[name].cfg
        pairs = {
            "architecture": (made.inference.architecture(), given.architecture()),
            "n_heads": (site.n_heads, given.n_heads),
            "d_head": (site.d_head, given.d_head),
            "d_sae_per_head": (settings.d_sae_per_head, given.d_sae_per_head),
            "apply_b_dec_to_input": (settings.apply_b_dec_to_input, given.apply_b_dec_to_input),
        }
        for what, (wanted, found) in pairs.items():
            if wanted != found:
                raise ValueError(
                    f"{what} of start at {name} must be {wanted!r}, got {found!r}: change the "
                    "config, or start from other SAEs"
                )


@torch.no_grad()
def load_start(
    sae: QueryHeadTrainingSAE[Any], given: QueryHeadSAE[Any], scale: PerHead | None
) -> None:
    """Copy the weights of an inference SAE into one in training.

    Args:
        sae: its weights are replaced.
        given: an SAE that passed `check_start`.
        scale: factors by which training multiplies the queries; None if it does not.
    """
    state = given.state_dict()
    if "topk_threshold" in sae.state_dict():  # saved as that of every latent
        state["topk_threshold"] = state.pop("threshold").amax(-1)
    sae.load_state_dict(state)
    if scale is not None:
        kind = sae.cfg.normalize_activations
        sae.fold_activation_norm_scaling_factor(1 / scale)
        sae.cfg.normalize_activations = kind
