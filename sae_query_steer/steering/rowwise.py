"""Another edit for each row of a batch, so that one call of `generate` serves many."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.keys import AttentionKeys
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads


@dataclass(frozen=True, eq=False)
class Rowwise(Edit):
    """An edit for each row of the batch; the same edit may stand for many rows."""

    edits: Sequence[Edit]
    """One for each row, in order."""

    @property
    def needs_keys(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether an edit of a row sees keys."""
        return any(edit.needs_keys for edit in self.edits)

    @property
    def labels(self) -> dict[str, str]:
        """Return what a trace is to know."""
        return {"method": "row by row"}

    def to(self, device: str | torch.device) -> "Rowwise":
        """Return it with its weights on a device."""
        moved = {id(edit): edit.to(device) for edit in self.edits}
        return Rowwise([moved[id(edit)] for edit in self.edits])

    def change(
        self,
        activations: Float[Tensor, "token head d_head"],
        at: SiteHeads,
        tokens: TokenPositions,
        *,
        record: bool = False,
        keys: AttentionKeys | None = None,
    ) -> QueryChange:
        """Return each row's change, by its own edit.

        Raises:
            ValueError: the batch has another number of rows.
        """
        del record
        check_rows(len(self.edits), tokens.n_rows)
        delta, bias = torch.zeros_like(activations), None
        for edit in {id(edit): edit for edit in self.edits}.values():
            own = torch.tensor(
                [i for i, r in enumerate(tokens.row.tolist()) if self.edits[r] is edit]
            )
            if len(own):
                own = own.to(activations.device)
                seen: dict[str, Any] = {"keys": keys and keys.at_tokens(own)}
                change = edit.change(
                    activations[own], at, tokens.at(own), **(seen if edit.needs_keys else {})
                )
                delta[own] = change.delta.to(delta)
                if (one := change.score_bias) is not None:
                    bias = one.new_zeros(len(delta), *one.shape[1:]) if bias is None else bias
                    bias[own] = one
        return QueryChange(delta=delta, score_bias=bias)


@dataclass(frozen=True)
class _AllOf:
    """The origins of several steerers."""

    steerers: tuple[Steerer, ...]

    def check_model(self, model: object) -> None:
        for steerer in self.steerers:
            steerer.check_model(model)

    def to(self, device: str | torch.device) -> "_AllOf":
        return _AllOf(tuple(steerer.to(device) for steerer in self.steerers))


def rowwise(steerers: Sequence[Steerer]) -> Steerer:
    """Return a steerer that applies another steerer's edit in each row of a batch.

    Args:
        steerers: one for each row, all of the same sites, heads and scope; the same object may
            stand for many rows.

    Raises:
        ValueError: none, or steerers of different sites or heads.
    """
    if not steerers:
        raise ValueError("steerers must hold one for each row of the batch, got none")
    first = steerers[0]
    for steerer in steerers:
        if _heads(steerer) != _heads(first):
            raise ValueError(
                f"steerers must have the same sites and heads, got {first.where} and "
                f"{steerer.where}"
            )
    origin = _AllOf(tuple({id(steerer): steerer for steerer in steerers}.values()))
    return Steerer(Rowwise([steerer.edit for steerer in steerers]), first.where, origin=origin)


def _heads(steerer: Steerer) -> dict[str, tuple[int, ...]]:
    return {name: at.heads for name, at in steerer.where.chosen.items()}


def check_rows(have: int, rows: int) -> None:
    """Raise unless there is something for every row of a batch.

    Raises:
        ValueError: the message gives both numbers.
    """
    if have != rows:
        raise ValueError(
            f"the batch has {rows} rows, there is something for {have}: give all prompts in one "
            "call of generate(), in order"
        )
