"""Several steerers in the same forward passes, each on its own copy of the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sae_query_steer.models.placed_hooks import Hook
from sae_query_steer.models.prefix import PrefixedRows
from sae_query_steer.steering.engine import AppliedEdit, Changes, tokens_once
from sae_query_steer.steering.steerer import AnySteerer, parts_of


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
        at: dict[str, list[tuple[int, Hook]]] = {}
        for copy, steerer in enumerate(self.steerers):
            for part in parts_of(steerer):
                find = tokens_once(part.where.scope)
                for name, site in part.where.chosen.items():
                    edit = AppliedEdit(part.edit, site, find, changes=self.changes[copy])
                    hook = edit.hook(lambda _, copy=copy: self.rows.running[copy])
                    at.setdefault(name, []).append((copy, hook))
        return [(name, self._hook(hooks)) for name, hooks in at.items()]

    def _hook(self, hooks: Sequence[tuple[int, Hook]]) -> Hook:
        def change(activation: Tensor, hook: Any) -> Tensor:
            parts = list(activation.chunk(len(self.steerers), dim=1))
            for copy, make in hooks:
                after = make(parts[copy], hook=hook)
                parts[copy] = parts[copy] if after is None else after
            return torch.cat(parts, dim=1)

        vars(change)["steers_queries"] = True  # read by models.loading.check_not_steered
        return change
