"""The L1 penalty that the standard and the gated architecture share, and what weights may be."""

import math
from abc import ABC
from dataclasses import dataclass

from sae_lens.saes.sae import TrainCoefficientConfig
from typing_extensions import override

from sae_query_steer.sae.core import QueryHeadTrainingSAEConfig


@dataclass(kw_only=True)
class L1TrainingSAEConfig(QueryHeadTrainingSAEConfig, ABC):
    """Settings of an L1 penalty; names and values are SAELens's."""

    l1_coefficient: float = 1.0
    """Weight of the penalty."""

    l1_warm_up_steps: int = 0
    """Steps over which the weight grows from 0."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("l1_coefficient", self.l1_coefficient)
        check_steps("l1_warm_up_steps", self.l1_warm_up_steps)

    def coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """Return the weight with its warm-up, as SAELens's trainer wants it."""
        return {"l1": TrainCoefficientConfig(self.l1_coefficient, self.l1_warm_up_steps)}


def check_weight(name: str, value: float) -> None:
    """Raise ValueError unless the weight of a loss is a finite number, 0 or more."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value} is not allowed: give a finite number, 0 or more")


def check_steps(name: str, value: int) -> None:
    """Raise ValueError unless a number of steps is 0 or more."""
    if value < 0:
        raise ValueError(f"{name}={value} is not allowed: give 0 or more steps")
