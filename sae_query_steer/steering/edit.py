"""An edit: what is added to activations at some tokens. It knows no model and no scope."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads


class Edit(ABC):
    """The mathematics of an intervention; `Steerer` joins one with sites, heads and a scope.

    A subclass needs `change` alone.
    """

    needs_keys: ClassVar[bool] = False
    """Whether `change` has a parameter `keys` and takes an `AttentionKeys`: sites of queries only.
    Such an edit takes effect in the attention scores, not at the hook point of the queries."""

    has_target: ClassVar[bool] = False
    """Whether `progress` tells an overshoot: the first change of a block is then recorded."""

    @abstractmethod
    def change(
        self,
        activations: Float[Tensor, "token head d_head"],
        at: SiteHeads,
        tokens: TokenPositions,
        *,
        record: bool = False,
    ) -> QueryChange:
        """Return what is added to the activations of some tokens.

        Args:
            activations: of the heads `at.heads` alone, in their order, in 32 bits at least.
            at: the site and its heads.
            tokens: row and absolute position of each token, and the rows' prompt lengths.
            record: also return how the change came about, for a trace.
        """

    def progress(self, made: QueryChange, tokens: TokenPositions) -> tuple[bool, str]:
        """Return whether a recorded change overshoots its target, and a text for a warning.

        Args:
            made: what `change` returned with `record=True`.
            tokens: as for `change`.
        """
        del made, tokens
        return False, ""

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know: `method`, `classes`, `target`, `row_targets`."""
        return {"method": type(self).__name__}

    def to(self, device: str | torch.device) -> "Edit":
        """Return this edit with its weights on a device."""
        del device
        return self
