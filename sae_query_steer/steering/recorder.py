"""Records what an edit does, and the attention of the tokens that it changed."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sae_query_steer.models.tracking import PositionTracker
from sae_query_steer.scopes.positions import Positions, TokenPositions
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering.trace import QueryChange, SteeringTrace, TraceRecord
from sae_query_steer.steering.where import SiteHeads

_Record = TypeVar("_Record", QueryChange, TokenPositions)


@dataclass(eq=False)
class Recorder:
    """Keeps what an edit does in a trace."""

    trace: SteeringTrace
    """Where to keep it."""

    tracker: PositionTracker
    """Knows the running pass; must keep tokens."""

    _steered: dict[int, tuple[TokenPositions, SiteHeads, int]] = field(default_factory=dict)
    """Tokens and heads of each layer that were changed in the running pass, and their record."""

    def read(self, positions: Positions) -> None:
        """Keep the tokens of the rows so far, steered or not."""
        if positions.tokens is not None:
            self.trace.read[self.tracker.run_number] = positions

    def keep(
        self, made: QueryChange, before: Tensor, at: SiteHeads, tokens: TokenPositions
    ) -> None:
        """Keep one change of activations."""
        assert tokens.column is not None, "tokens of a running pass have columns"
        self._steered[at.site.layer] = (tokens, at, len(self.trace.records))
        self.trace.records.append(
            TraceRecord(
                run=self.tracker.run_number,
                layer=at.site.layer,
                heads=torch.tensor([-1] if ".hook_resid_" in at.hook_name else at.heads),
                places=on_cpu(tokens),
                token=self.tracker.tokens_at(tokens.row, tokens.column),
                query_norm=before.detach().float().norm(dim=-1).cpu(),
                change=on_cpu(made),
                query=before.detach().cpu() if isinstance(at.site, QuerySite) else None,
            )
        )

    def keep_attention(self, layer: int, pattern: Tensor, hook: Any) -> None:
        """Keep the attention of the changed tokens: a hook, once the layer is given."""
        del hook  # its name differs between the backends
        if layer not in self._steered:
            return
        tokens, at, index = self._steered.pop(layer)
        positions = self.tracker.positions
        assert positions is not None, "a pass of a tracked model has positions"
        if positions.tokens is None:
            return  # the input is embeddings: the source tokens are unknown
        self.trace.texts[self.tracker.run_number] = positions.tokens.cpu()
        row, column, head = tokens.index(at.heads)
        mass, n_sources = pattern.detach()[row, head, column], self.tracker.columns.shape[1]
        source = self.tracker.key_positions(pattern.shape[-1])[tokens.row].to(mass.device)
        source = source.where(source >= 0, n_sources)  # padding: an extra place, dropped below
        by_position = mass.new_zeros(*mass.shape[:2], n_sources + 1)
        by_position.scatter_(2, source[:, None].expand_as(mass), mass)
        record = replace(self.trace.records[index], pattern=by_position[..., :-1].cpu())
        self.trace.records[index] = record


def on_cpu(record: _Record) -> _Record:
    """Return a copy of a dataclass with its tensors on the CPU, without gradients."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = {name: t.detach().cpu() for name, t in values.items() if isinstance(t, Tensor)}
    return replace(record, **tensors)
