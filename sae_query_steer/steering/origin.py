"""Which model an edit belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

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
            ValueError: another model, other SAEs, or SAEs on another device.
        """
        check_belongs(model, self.encoders, self.targets)

    def to(self, device: str | torch.device) -> "FromCentroids":
        """Return it with its encoders on a device."""
        return replace(self, encoders=encoders_on(self.encoders, device))


def encoders_on(
    encoders: Mapping[str, QueryEncoder], device: str | torch.device
) -> dict[str, QueryEncoder]:
    """Return encoders on a device; what is there already is shared."""
    return {name: on_device(encoder, device) for name, encoder in encoders.items()}
