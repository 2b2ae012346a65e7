"""Attention of the steered tokens, with and without steering."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.models.activations import pattern_hook, read_activations
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.models.tracking import PositionTracker

KEYS = ["run", "row", "position", "layer", "head"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionRecord:
    """The attention of the steered tokens of one forward pass at one layer."""

    run: int
    layer: int
    heads: tuple[int, ...]
    row: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    pattern: Float[Tensor, "token head source"]
    """By absolute position of the source token, without padding."""


@dataclass(eq=False)
class AttentionTrace:
    """Attention of every steered forward pass, and the texts that were read."""

    records: list[AttentionRecord] = field(default_factory=list)
    texts: dict[int, Int[Tensor, "row pos"]] = field(default_factory=dict)
    """Token ids of the rows of each run, by absolute position; -1 after the end of a row."""

    def change(self, model: Any, tokenizer: Any) -> pd.DataFrame:
        """Return the change of attention; see `SteeringTrace.attention_change`."""
        check_not_steered(model)
        before = {run: self._unsteered(model, run) for run in self.texts}
        tables = [self._table(record, before[record.run], tokenizer) for record in self.records]
        table = pd.concat(tables, ignore_index=True)
        table = table.drop_duplicates([*KEYS, "source_position"], keep="first")
        return table.sort_values([*KEYS, "source_position"]).reset_index(drop=True)

    def _unsteered(self, model: Any, run: int) -> dict[int, Tensor]:
        layers = sorted({record.layer for record in self.records if record.run == run})
        names = {layer: pattern_hook(layer) for layer in layers}
        found = read_activations(model, self.texts[run], names.values())
        return {layer: found[name] for layer, name in names.items()}

    def _table(
        self, record: AttentionRecord, before: dict[int, Tensor], tokenizer: Any
    ) -> pd.DataFrame:
        n_tokens, n_heads, n_sources = record.pattern.shape
        seen = torch.arange(n_sources) <= record.position[:, None]
        token, source, place = seen[..., None].expand(-1, -1, n_heads).nonzero(as_tuple=True)
        row, position = record.row[token], record.position[token]
        head, ids = torch.tensor(record.heads)[place], self.texts[record.run][row, source]
        after = record.pattern[token, place, source].double()
        pattern = before[record.layer].cpu()
        columns: dict[str, Any] = {
            "run": record.run,
            "row": row,
            "position": position,
            "layer": record.layer,
            "head": head,
            "source_position": source,
            "source_token": ids,
            "attention_before": pattern[row, head, position, source].double(),
            "attention_after": after,
        }
        table = pd.DataFrame({name: np.asarray(value) for name, value in columns.items()})
        if tokenizer is not None:
            names = {int(i): tokenizer.decode([int(i)]) for i in ids.unique()}
            table.insert(7, "source_text", [names[int(i)] for i in ids])
        table["change"] = table["attention_after"] - table["attention_before"]
        return table


class AttentionRecorder:
    """Records the attention patterns of steered layers.

    Args:
        trace: where to store them.
        tracker: tracks padding and texts; must keep tokens.
    """

    def __init__(self, trace: AttentionTrace, tracker: PositionTracker) -> None:
        self._trace, self._tracker = trace, tracker
        self._steered: dict[int, tuple[Tensor, Tensor, Sequence[int]]] = {}

    def steered(self, layer: int, rows: Tensor, columns: Tensor, heads: Sequence[int]) -> None:
        """Note which queries of the running forward pass were changed at a layer."""
        self._steered[layer] = (rows, columns, heads)

    def hook(self, layer: int) -> Callable[..., None]:
        """Return the hook for the attention pattern of a layer."""

        def keep(pattern: Float[Tensor, "batch head query key"], hook: Any) -> None:
            del hook  # its name differs between the backends
            if layer in self._steered:
                self._keep(layer, pattern.detach())

        return keep

    def _keep(self, layer: int, pattern: Tensor) -> None:
        rows, columns, heads = self._steered.pop(layer)
        positions = self._tracker.positions
        assert positions is not None, "a pass of a tracked model has positions"
        texts = positions.tokens
        if texts is None:
            return  # the input is embeddings: the source tokens are unknown
        run = self._tracker.run_number
        self._trace.texts[run] = texts.cpu()
        # A sliding cache has only the last keys.
        real = self._tracker.columns[rows].to(pattern.device)
        source = real.long().cumsum(1) - 1
        n_keys = pattern.shape[-1]
        real, source = real[:, -n_keys:], source[:, -n_keys:]
        n_sources = self._tracker.columns.shape[1]
        source = torch.where(
            real, source, n_sources
        )  # padding goes to an extra position, dropped below
        at = pattern[rows[:, None], torch.tensor(heads, device=rows.device), columns[:, None]]
        by_position = at.new_zeros(*at.shape[:2], n_sources + 1)
        by_position.scatter_(2, source[:, None].expand_as(at), at)
        self._trace.records.append(
            AttentionRecord(
                run=run,
                layer=layer,
                heads=tuple(heads),
                row=rows.cpu(),
                position=positions.index[rows, columns].cpu(),
                pattern=by_position[..., :-1].cpu(),
            )
        )
