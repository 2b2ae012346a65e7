"""Several steerers in the same forward passes, each on its own copy of the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.models.placed_hooks import Hook
from sae_query_steer.models.prefix import PrefixedRows
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.steering.engine import AppliedEdit, by_head, tokens_once
from sae_query_steer.steering.steerer import AnySteerer, parts_of


class Changes(NamedTuple):
    """How much some tokens changed at a site."""

    tokens: TokenPositions

    relative: Float[Tensor, "token head"]
    """|change| / |activation|."""


@dataclass(eq=False)
class SideBySide:
    """Hooks of several steerers for `PrefixedRows.generate` of rows that are repeated.

    Copy i of the rows is changed by steerer i alone. Only for edits of activations that see no
    keys, at tokens that are not in the cache.
    """

    steerers: Sequence[AnySteerer]
    """One for each copy."""

    rows: PrefixedRows
    """The copies, which share their cache."""

    changes: list[list[Changes]] = field(init=False)
    """What each steerer changed, pass by pass."""

    def __post_init__(self) -> None:
        self.changes = [[] for _ in self.steerers]

    def hooks(self) -> list[tuple[str, Hook]]:
        """Return pairs of a hook name and a hook."""
        at: dict[str, list[tuple[int, AppliedEdit]]] = {}
        for copy, steerer in enumerate(self.steerers):
            for part in parts_of(steerer):
                find = tokens_once(part.where.scope)
                for name, site in part.where.chosen.items():
                    at.setdefault(name, []).append((copy, AppliedEdit(part.edit, site, find)))
        return [(name, self._hook(edits)) for name, edits in at.items()]

    def _hook(self, edits: Sequence[tuple[int, AppliedEdit]]) -> Hook:
        hooks = [
            (copy, edit, edit.hook(lambda _, copy=copy: self.rows.running[copy]))
            for copy, edit in edits
        ]

        def change(activation: Tensor, hook: Any) -> Tensor:
            parts = list(activation.chunk(len(self.steerers), dim=1))
            for copy, edit, make in hooks:
                before = parts[copy]
                after = make(before, hook=hook)
                if after is not None:
                    parts[copy] = after
                    self._note(copy, edit, by_head(before, edit.at), by_head(after, edit.at))
            return torch.cat(parts, dim=1)

        vars(change)["steers_queries"] = True  # read by models.loading.check_not_steered
        return change

    def _note(self, copy: int, edit: AppliedEdit, before: Tensor, after: Tensor) -> None:
        tokens = edit.find(self.rows.running[copy])
        index = tokens.index(edit.at.heads)
        moved = (after[index] - before[index]).float().norm(dim=-1)
        ratio = moved / before[index].float().norm(dim=-1).clamp(min=1e-30)
        self.changes[copy].append(Changes(tokens, ratio.cpu()))
