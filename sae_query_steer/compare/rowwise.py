"""Steerers that treat every row of a batch differently, at the last token of its prompt.

A batch in which each row goes to another class, or has latents of its own that may move, costs one
call of `generate` and not one for each class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.descent.places import TokenPlaces
from sae_query_steer.scopes.positions import LastPromptToken, Scope
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering.intervention import Steerer
from sae_query_steer.steering.trace import QueryChange, SteeringTrace


@dataclass(frozen=True, eq=False)
class RowwiseSteerer(Steerer):
    """Another steerer for each row of a batch; all of the same sites, heads and model."""

    steerers: Sequence[Steerer]
    """One for each row; the same object may stand for many rows. Their scope is not asked."""

    scope: Scope = field(init=False, repr=False, default_factory=LastPromptToken)
    """The last prompt token: there every row has one query, so rows are told by their order."""

    sites: Mapping[str, QuerySite] = field(init=False, repr=False)
    """Those of the steerers."""

    site_heads: Mapping[str, tuple[int, ...]] = field(init=False, repr=False)
    """Those of the steerers."""

    def __post_init__(self) -> None:
        if not self.steerers:
            raise ValueError("no steerers: give one for each row of the batch")
        first = self.steerers[0]
        for steerer in self.steerers:
            if dict(steerer.site_heads) != dict(first.site_heads):
                raise ValueError(
                    f"steerers of different sites or heads: {dict(first.site_heads)} and "
                    f"{dict(steerer.site_heads)}; a batch is steered at the same places"
                )
        object.__setattr__(self, "sites", first.sites)
        object.__setattr__(self, "site_heads", first.site_heads)

    def check_model(self, model: Any) -> None:
        """Raise unless every steerer belongs to this model."""
        for steerer in {id(steerer): steerer for steerer in self.steerers}.values():
            steerer.check_model(model)

    def new_trace(self, model: Any, *, recording: bool) -> SteeringTrace:
        """Return an empty trace."""
        return SteeringTrace(recording=recording, method="row by row", tokenizer=model.tokenizer)

    def change(
        self,
        hook_name: str,
        queries: Float[Tensor, "token head d_head"],
        places: TokenPlaces,
        *,
        record: bool,
    ) -> QueryChange:
        """Return each row's change, by its own steerer.

        Raises:
            ValueError: the batch has another number of rows.
        """
        del record
        check_rows(len(self.steerers), len(queries))
        delta = torch.zeros_like(queries)
        for steerer in {id(steerer): steerer for steerer in self.steerers}.values():
            rows = torch.tensor([i for i, own in enumerate(self.steerers) if own is steerer])
            rows = rows.to(queries.device)
            change = steerer.change(hook_name, queries[rows], places.at(rows), record=False)
            delta[rows] = change.delta.to(delta)
        return QueryChange(delta=delta)


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
