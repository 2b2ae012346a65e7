"""Traces: what an intervention changed, per token, layer and head."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.scopes.positions import Positions, TokenPositions
from sae_query_steer.steering.attention_trace import KEYS, attention_table
from sae_query_steer.steering.trace_html import note_html, text_html

_MEANS = (
    *("relative_change", "distance_before", "distance_after", "lowering_steps"),
    *("loss_before", "loss_after", "mass_before", "mass_after"),
    *("nearest_is_target_before", "nearest_is_target_after"),
)
"""Columns of a summary that are means."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryChange:
    """A change of the queries of some tokens at one site, with what the descent did if recorded."""

    delta: Float[Tensor, "token head d_head"]
    """What is added to the queries."""

    score_bias: Float[Tensor, "token head key"] | None = None
    """What is added to the attention scores, by an edit that sees keys."""

    distance_before: Float[Tensor, "token head class"] | None = None
    """Euclidean distance of the latent to every centroid before the change."""

    distance_after: Float[Tensor, "token head class"] | None = None
    """The same after the change."""

    loss: Float[Tensor, "steps token head"] | None = None
    """Loss before the first step and after each."""

    mass_before: Float[Tensor, "token head source"] | None = None
    """Attention on the sources of a `LookAt` before the change, 0 to 1."""

    mass_after: Float[Tensor, "token head source"] | None = None
    """The same after the change."""

    moved_latents: Int[Tensor, "token head moved"] | None = None
    """The latents that moved most, in descending order of the change."""

    moved_by: Float[Tensor, "token head moved"] | None = None
    """Their changes, signed."""

    n_moved: Int[Tensor, "token head"] | None = None
    """Number of latents that moved."""

    temperature: float = 1.0
    """T of the posterior, softmax of -distance^2 / 2T."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceRecord:
    """One change and the tokens, layer and heads that it was applied to."""

    run: int
    layer: int
    heads: Int[Tensor, " head"]
    places: TokenPositions
    token: Int[Tensor, " token"] | None
    query_norm: Float[Tensor, "token head"]
    change: QueryChange
    query: Float[Tensor, "token head d_head"] | None = None
    """The queries before the change; None if another activation was changed."""
    pattern: Float[Tensor, "token head source"] | None = None
    """Attention, by absolute position of the source token without padding, if it is recorded."""


@dataclass(eq=False)
class SteeringTrace:
    """Records of every change of an intervention; empty unless applied with `record=True`."""

    recording: bool
    classes: Sequence[str] = ()
    target: str = ""
    row_targets: tuple[str, ...] = ()
    method: str = "latent gradient"
    tokenizer: Any = None
    records: list[TraceRecord] = field(default_factory=list)
    read: dict[int, Positions] = field(default_factory=dict)
    """The last forward pass of each run whose tokens are known."""
    texts: dict[int, Tensor] = field(default_factory=dict)
    """Token ids [row pos] of each run whose attention was recorded; -1 after the end of a row."""

    def __repr__(self) -> str:
        state = f"{len(self.records)} records" if self.recording else "not recorded"
        return f"SteeringTrace({state}, target {self.target!r})"

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row for every steered token, layer and head.

        A position that is computed again, as in every step of `generate` without a KV cache, is
        counted once.

        Returns:
            A table with the columns

            - run: the call of `generate`, or the forward pass outside it, from 0
            - row, position: row of the batch; absolute position in the row, without padding
            - token, text: id and text of the token at that position, if known
            - layer, head, method, target
            - delta_norm, query_norm, relative_change: norm of the change, of the query, their ratio
            - loss_before, loss_after, lowering_steps: the loss of the objective; share of the steps
              that lowered it (absent if the method has no objective)
            - mass_before, mass_after: attention of the head on the source of a `LookAt`; of further
              ones mass_before.1, ...
            - distance_before.C, distance_after.C: Euclidean distance to the centroid of class C
            - posterior_before.C, posterior_after.C: softmax over the classes of -distance^2 / 2T
            - nearest_before, nearest_after: class of the nearest centroid
            - n_latents_moved, latents_moved: number of latents that moved, and those that moved
              most, as a tuple of (latent, change) in descending order of the change

        Raises:
            ValueError: the intervention was applied without `record=True`.
        """
        if not self.recording:
            raise ValueError(
                "nothing was recorded: use `with steerer.apply(model, record=True) as trace`"
            )
        if not self.records:
            return pd.DataFrame(columns=[*KEYS, "target", "delta_norm", "relative_change"])
        table = pd.concat([self._table(record) for record in self.records], ignore_index=True)
        table = table.drop_duplicates(KEYS, keep="first")
        return table.sort_values(KEYS).reset_index(drop=True)

    def summary(self) -> pd.DataFrame:
        """Return one row for each layer, and for each row of the batch where targets differ.

        The values are means over tokens and heads.

        Shows whether the descent reached the target and whether it overshot: `lowering_steps` far
        below 1, or `distance_after` above `distance_before`, means that `step_size` or `n_steps` is
        too large, even if the loss is 0 and the target's centroid is the nearest. None of these
        columns measures the effect on the text.

        Returns:
            A table with the columns layer, row (where targets differ), n_tokens (steered tokens),
            relative_change, distance_before and distance_after (Euclidean distance to the target's
            centroid; absent for mixtures), lowering_steps (share of the steps that lowered the
            loss), loss_before, loss_after, mass_before and mass_after (attention on what the heads
            are to look at), nearest_is_target_before and nearest_is_target_after
            (share of tokens and heads whose nearest centroid is the target's).

        Raises:
            ValueError: the intervention was applied without `record=True`.
        """
        table = self.to_dataframe()
        single = [name for name in map(str, self.classes) if name in set(table["target"])]
        for when in ("before", "after"):
            if f"nearest_{when}" in table:
                table[f"nearest_is_target_{when}"] = table[f"nearest_{when}"] == table["target"]
                for name in single:
                    here = table["target"] == name
                    table.loc[here, f"distance_{when}"] = table[f"distance_{when}.{name}"]
        by = ["layer", "row"] if self.row_targets else ["layer"]
        means = table.groupby(by)[[name for name in _MEANS if name in table]].mean()
        tokens = table.drop_duplicates(["layer", *KEYS[:3]]).groupby(by).size()
        means.insert(0, "n_tokens", tokens)
        return means.reset_index()

    def attention_change(self, model: Any) -> pd.DataFrame:
        """Return the attention of the steered tokens to every token, with and without steering.

        The texts are read again without steering: `attention_before` is the attention of the same
        head to the same token in that pass. If several layers are steered, none of them is in it.

        Args:
            model: the model that was steered, outside the `with` block.

        Returns:
            A row for each steered token, layer, head and token that it can attend to, with run,
            row, position, layer, head, source_position, source_token, source_text (if there is a
            tokenizer), attention_before, attention_after, change. The changes of a head sum to 0.

        Raises:
            ValueError: the intervention was applied without `record_attention=True`, no token was
                steered, or the model is still steered.
        """
        records = [record for record in self.records if record.pattern is not None]
        if not records:
            raise ValueError(
                "no attention was recorded: use `with steerer.apply(model, record_attention=True) "
                "as trace`, and steer at least one token in the block"
            )
        return attention_table(records, self.texts, model, self.tokenizer)

    def to_html(self, value: str = "relative_change") -> str:
        """Return the steered text, each token coloured by a value.

        Shown are the steered tokens, those around them, and what was written, up to the last token,
        which the model never reads. Tooltips show the position, the relative change, and the
        nearest class before and after. Notebooks display the trace as the last value of a cell.

        Args:
            value: the column of `to_dataframe` that sets the colour, as mean over layers and heads.

        Returns:
            Self-contained HTML without scripts, in ASCII.

        Raises:
            ValueError: the intervention was applied without `record=True`, or `value` is not a
                numeric column.
        """
        return text_html(self.to_dataframe(), value, self._texts())

    def _repr_html_(self) -> str:
        try:
            return self.to_html()
        except ValueError as error:
            return note_html(str(error))

    def _texts(self) -> pd.DataFrame:
        """Return every token that was read, steered or not, and whether it was generated."""
        known = self.tokenizer is not None
        decode = cache(lambda token: self.tokenizer.decode([token]) if known else None)
        rows = []
        for run, positions in self.read.items():
            assert positions.tokens is not None, "kept where tokens are known"
            ends = positions.prompt_lengths
            for row, tokens in enumerate(positions.tokens.tolist()):
                end = len(tokens) if ends is None else int(ends[row])
                rows += [
                    (run, row, position, decode(token), position >= end)
                    for position, token in enumerate(tokens)
                    if token >= 0
                ]
        return pd.DataFrame(rows, columns=[*KEYS[:3], "text", "written"])

    def _table(self, record: TraceRecord) -> pd.DataFrame:
        change, places, n_heads = record.change, record.places, len(record.heads)
        columns: dict[str, Any] = {
            "run": record.run,
            "row": places.row.repeat_interleave(n_heads),
            "position": places.position.repeat_interleave(n_heads),
            "layer": record.layer,
            "head": record.heads.repeat(len(places.row)),
            "method": self.method,
            "target": self.target,
        }
        if self.row_targets:
            columns["target"] = [self.row_targets[row] for row in columns["row"]]
        if record.token is not None:
            columns["token"] = record.token.repeat_interleave(n_heads)
            if self.tokenizer is not None:
                texts = [self.tokenizer.decode([int(token)]) for token in record.token]
                columns["text"] = np.repeat(np.array(texts, dtype=object), n_heads)
        delta, norm = change.delta.double().norm(dim=-1), record.query_norm.double()
        columns |= {
            "delta_norm": delta,
            "query_norm": norm,
            "relative_change": delta / norm.clamp(min=1e-30),
        }
        if change.loss is not None:
            columns |= {"loss_before": change.loss[0], "loss_after": change.loss[-1]}
            if len(change.loss) > 1:
                lowered = change.loss.double().diff(dim=0) < 0
                columns["lowering_steps"] = lowered.double().mean(0)
        names = np.array(list(map(str, self.classes)), dtype=object)
        for when in ("before", "after"):
            masses = getattr(change, f"mass_{when}")
            for i, mass in enumerate([] if masses is None else masses.unbind(-1)):
                columns[f"mass_{when}.{i}" if i else f"mass_{when}"] = mass
            distance = getattr(change, f"distance_{when}")
            if distance is not None:
                distance = distance.double().flatten(0, 1)
                posterior = (-distance.square() / (2 * change.temperature)).softmax(1)
                for name, own in zip(names, distance.T, strict=True):
                    columns[f"distance_{when}.{name}"] = own
                columns[f"nearest_{when}"] = names[distance.argmin(1).numpy()]
                for name, own in zip(names, posterior.T, strict=True):
                    columns[f"posterior_{when}.{name}"] = own
        if change.moved_latents is not None and change.moved_by is not None:
            columns["n_latents_moved"] = change.n_moved
            columns["latents_moved"] = _moved(change.moved_latents, change.moved_by)
        return pd.DataFrame({name: _column(value) for name, value in columns.items()})


def _column(value: Any) -> Any:
    """Return a column of a table from a tensor, [token head] or as many; floats in 64 bits."""
    if not isinstance(value, Tensor):
        return value
    return (value.double() if value.is_floating_point() else value).flatten().numpy()


def _moved(latents: Tensor, by: Tensor) -> list[tuple[tuple[int, float], ...]]:
    """Return (latent, change) of the latents that moved, for each token and head."""
    cells = zip(latents.flatten(0, 1).tolist(), by.flatten(0, 1).tolist(), strict=True)
    return [tuple((i, x) for i, x in zip(*moves, strict=True) if x != 0) for moves in cells]
