"""Another edit for each row of a batch, so that one call of `generate` serves many."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sae_query_steer.descent.strength import Queries
from sae_query_steer.scopes.positions import TokenPositions, check_rows
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads


@dataclass(frozen=True, eq=False)
class Rowwise(Edit):
    """An edit for each row of the batch; the same edit may stand for many rows."""

    edits: Sequence[Edit]

    @property
    def labels(self) -> dict[str, Any]:
        """Return what a trace is to know."""
        return {"method": "row by row"}

    def change(
        self, activations: Queries, at: SiteHeads, tokens: TokenPositions, *, record: bool = False
    ) -> QueryChange:
        """Return each row's change, by its own edit."""
        del record
        check_rows("the steerer", len(self.edits), tokens.n_rows)
        delta = torch.zeros_like(activations)
        for edit in {id(edit): edit for edit in self.edits}.values():
            own = torch.tensor([self.edits[r] is edit for r in tokens.row.tolist()])
            own = own.to(activations.device)
            if own.any():
                some = replace(tokens, row=tokens.row[own], position=tokens.position[own])
                delta[own] = edit.change(activations[own], at, some).delta.to(delta)
        return QueryChange(delta=delta)


def rowwise(steerers: Sequence[Steerer]) -> Steerer:
    """Return a steerer with one for each row, all of the same model, sites, heads and scope."""
    edit = Rowwise([steerer.edit for steerer in steerers])
    return Steerer(edit, steerers[0].where, origin=steerers[0])
