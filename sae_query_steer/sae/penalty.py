"""The L1 penalty that the standard and the gated architecture share."""

from abc import ABC
from dataclasses import dataclass

from sae_lens.saes.sae import TrainCoefficientConfig
from typing_extensions import override

from sae_query_steer.sae.core import QueryHeadTrainingSAEConfig, check_steps, check_weight


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
