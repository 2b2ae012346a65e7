"""Edits: what is added to activations at some tokens. They know no model and no scope."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sae_query_steer.descent.strength import Queries
from sae_query_steer.sae.encoders import QueryEncoder, at_heads, on_device
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads

N_MOVED = 5
"""Number of latents that a trace lists for each token and head."""


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
        self, activations: Queries, at: SiteHeads, tokens: TokenPositions, *, record: bool = False
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


_Moves = TypeVar("_Moves", bound="LatentsEdit")


@dataclass(frozen=True, eq=False)
class LatentsEdit(Edit):
    """An edit that moves latents and adds what encoders make of the move."""

    saes: Mapping[str, QueryEncoder]
    """Encoders by hook name; those of the layers that are steered. An `IdentityEncoder` may stand
    at any hook point of a `Site` too, such as `blocks.3.hook_resid_post`."""

    _made: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)

    def to(self: _Moves, device: str | torch.device) -> _Moves:
        """Return it with its SAEs on a device; what is there already is shared.

        Centroids need no moving: they follow the activations, layer by layer.
        """
        return replace(self, saes=encoders_on(self.saes, device))

    def _encoder(self, at: SiteHeads, device: torch.device) -> QueryEncoder:
        """Return the encoder of these heads alone, made once for each device."""
        key = (at.hook_name, at.heads, device)
        if key not in self._made:
            self._made[key] = at_heads(self.saes[at.hook_name], at.heads, device)
        return self._made[key]


def encoders_on(
    encoders: Mapping[str, QueryEncoder], device: str | torch.device
) -> dict[str, QueryEncoder]:
    """Return encoders on a device; what is there already is shared."""
    return {name: on_device(encoder, device) for name, encoder in encoders.items()}


def most_moved(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Return `moved_latents`, `moved_by` and `n_moved` of a `QueryChange`."""
    moved = after - before
    most = moved.abs().topk(min(N_MOVED, moved.shape[-1]), dim=-1).indices
    return {
        "moved_latents": most,
        "moved_by": moved.gather(-1, most),
        "n_moved": (moved != 0).sum(-1),
    }
