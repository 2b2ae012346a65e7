"""Which model an edit belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

from sae_query_steer.data.prompts import bos_id
from sae_query_steer.sae.encoders import QueryEncoder, on_device
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import check_belongs


@runtime_checkable
class Origin(Protocol):
    """What an edit was made from: it knows which model it belongs to."""

    def check_model(self, model: Any) -> None:
        """Raise ValueError unless it belongs to this model."""
        ...

    def to(self, device: str | torch.device) -> Any:
        """Return it with its weights on a device."""
        ...


@dataclass(frozen=True, eq=False)
class FromCentroids:
    """Encoders and the centroids that were made with them, on one model."""

    encoders: Mapping[str, QueryEncoder]
    """By hook name."""

    targets: CentroidTargets
    """Their centroids, with the fingerprint of the model."""

    def check_model(self, model: Any) -> None:
        """Raise unless the centroids were made with these encoders on this model.

        Raises:
            ValueError: another model, other SAEs, SAEs on another device, or texts with BOS where
                the model's prompts begin without, or the reverse.
        """
        check_belongs(model, self.encoders, self.targets)
        made = self.targets.prepend_bos
        if made is None or self.targets.chat_template or model.tokenizer is None:
            return
        if made != (bos_id(model) is not None):
            raise ValueError(
                f"the centroids were made with prepend_bos={made}, but by "
                f"model.cfg.default_prepend_bos={model.cfg.default_prepend_bos} prompts begin "
                f"{'without' if made else 'with'} BOS: set it to {made} (and pass the same to "
                "generate), or make the centroids anew"
            )

    def to(self, device: str | torch.device) -> "FromCentroids":
        """Return it with its encoders on a device."""
        return replace(self, encoders=encoders_on(self.encoders, device))


def encoders_on(
    encoders: Mapping[str, QueryEncoder], device: str | torch.device
) -> dict[str, QueryEncoder]:
    """Return encoders on a device; what is there already is shared."""
    return {name: on_device(encoder, device) for name, encoder in encoders.items()}
