"""SAEs with given weights, and the inference SAE of a trained one."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from sae_lens import SAE, SAEConfig
from sae_lens.registry import get_sae_class
from torch import Tensor

from sae_query_steer.sae.core import QueryHeadSAE, QueryHeadTrainingSAE

T_SAE = TypeVar("T_SAE", bound=SAE[Any])


def with_weights(
    sae_class: type[T_SAE],
    config: SAEConfig,
    weights: Mapping[str, Tensor],
    device: str | torch.device,
) -> T_SAE:
    """Return a frozen SAE that holds the given tensors, without drawing random weights first."""
    config.device = "meta"
    sae = sae_class(config)
    expected = sae.state_dict()
    sae.load_state_dict(
        {name: value.to(dtype=expected[name].dtype) for name, value in weights.items()},
        assign=True,
    )
    return sae.to(device=device).requires_grad_(False).eval()


def to_inference(sae: QueryHeadTrainingSAE[Any]) -> QueryHeadSAE[Any]:
    """Return the inference SAE of a trained one, equal to saving and loading it.

    The weights are copies, on the same device, and need no gradient.
    """
    state = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    settings = sae.cfg.get_inference_sae_cfg_dict()
    inference_class, config_class = get_sae_class(settings["architecture"])
    inference = with_weights(
        inference_class, config_class.from_dict(settings), state, sae.W_dec.device
    )
    assert isinstance(inference, QueryHeadSAE)
    return inference
