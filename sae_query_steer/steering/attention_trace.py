"""Attention of the steered tokens, with and without steering."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_query_steer.models.activations import pattern_hook, read_activations
from sae_query_steer.models.loading import check_not_steered

KEYS = ["run", "row", "position", "layer", "head"]


def attention_table(
    records: Sequence[Any], texts: Mapping[int, Tensor], model: Any, tokenizer: Any
) -> pd.DataFrame:
    """Return the change of attention; see `SteeringTrace.attention_change`.

    Args:
        records: each `TraceRecord` that has a pattern.
        texts: token ids [row pos] of each run, -1 after the end of a row.
        model: the model, not steered.
        tokenizer: for the texts of tokens; None leaves them out.
    """
    check_not_steered(model)
    before = {}
    for run, tokens in texts.items():
        layers = sorted({record.layer for record in records if record.run == run})
        found = read_activations(model, tokens, [pattern_hook(layer) for layer in layers])
        before |= {(run, layer): found[pattern_hook(layer)].cpu() for layer in layers}
    table = pd.concat(
        [_table(r, texts[r.run], before[r.run, r.layer], tokenizer) for r in records],
        ignore_index=True,
    )
    table = table.drop_duplicates([*KEYS, "source_position"], keep="first")
    return table.sort_values([*KEYS, "source_position"]).reset_index(drop=True)


def _table(record: Any, tokens: Tensor, before: Tensor, tokenizer: Any) -> pd.DataFrame:
    n_sources, n_heads = record.pattern.shape[-1], len(record.heads)
    seen = torch.arange(n_sources) <= record.places.position[:, None]
    token, source, place = seen[..., None].expand(-1, -1, n_heads).nonzero(as_tuple=True)
    row, position = record.places.row[token], record.places.position[token]
    head = record.heads.clamp(min=0)[place]  # the residual stream is -1
    ids = tokens[row, source]
    columns: dict[str, Any] = {
        "run": record.run,
        "row": row,
        "position": position,
        "layer": record.layer,
        "head": head,
        "source_position": source,
        "source_token": ids,
        "attention_before": before[row, head, position, source].double(),
        "attention_after": record.pattern[token, place, source].double(),
    }
    table = pd.DataFrame({name: np.asarray(value) for name, value in columns.items()})
    if tokenizer is not None:
        names = {int(i): tokenizer.decode([int(i)]) for i in ids.unique()}
        table.insert(7, "source_text", [names[int(i)] for i in ids])
    table["change"] = table["attention_after"] - table["attention_before"]
    return table
