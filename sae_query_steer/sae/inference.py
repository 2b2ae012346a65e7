"""From an SAE in training to the one that is used."""

from typing import Any

from sae_lens import SAE
from sae_lens.util import temporary_seed

from sae_query_steer.sae.core import QueryHeadSAE, QueryHeadTrainingSAE


def to_inference(sae: QueryHeadTrainingSAE[Any]) -> QueryHeadSAE[Any]:
    """Return the inference SAE of a trained one, as saving and loading it would.

    The weights are copies, on the same device, and need no gradient.
    """
    state = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    with temporary_seed(0):  # a new SAE draws weights, which are replaced at once
        inference = SAE.from_dict(sae.cfg.get_inference_sae_cfg_dict())
    inference.load_state_dict(state)
    assert isinstance(inference, QueryHeadSAE)
    return inference.requires_grad_(False).eval()
