"""What a steer did: per token, layer and head."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.descent.places import TokenPlaces
from sae_query_steer.steering.attention_trace import AttentionTrace
from sae_query_steer.steering.trace_html import note_html, text_html


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryChange:
    """A change of the queries of some tokens at one site, and on request how it came about."""

    delta: Float[Tensor, "token head d_head"]
    """What is added to the queries."""

    distance_before: Float[Tensor, "token head class"] | None = None
    """Euclidean distance of the latent to every centroid before the change."""

    distance_after: Float[Tensor, "token head class"] | None = None
    """The same afterwards."""

    loss: Float[Tensor, "steps token head"] | None = None
    """Loss before the first step and after each."""

    moved_latents: Int[Tensor, "token head moved"] | None = None
    """The latents that moved most, furthest first."""

    moved_by: Float[Tensor, "token head moved"] | None = None
    """By how much they rose or fell."""

    n_moved: Int[Tensor, "token head"] | None = None
    """How many latents moved at all."""

    temperature: float = 1.0
    """Of the posterior that the distances give."""

    def cpu(self) -> "QueryChange":
        """Return a copy without gradients on the CPU."""
        tensors = {
            field.name: value.detach().cpu()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceRecord:
    """One change, with where it happened."""

    run: int
    layer: int
    heads: Int[Tensor, " head"]
    row: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    token: Int[Tensor, " token"] | None
    query_norm: Float[Tensor, "token head"]
    change: QueryChange
    query: Float[Tensor, "token head d_head"] | None = None
    """The queries before; None where it is no query that was changed."""

    places: TokenPlaces | None = None
    """Where the tokens stand, as the steerer was told."""


@dataclass(eq=False)
class SteeringTrace:
    """Records of what a steer did; empty unless it was applied with `record=True`."""

    recording: bool
    classes: Sequence[str] = ()
    target: str = ""
    row_targets: tuple[str, ...] = ()
    method: str = "latent gradient"
    tokenizer: Any = None
    records: list[TraceRecord] = field(default_factory=list)
    attention: AttentionTrace = field(default_factory=AttentionTrace)

    def __repr__(self) -> str:
        state = f"{len(self.records)} records" if self.recording else "not recorded"
        return f"SteeringTrace({state}, target {self.target!r})"

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row for every steered token, layer and head.

        A position that is computed again, as in every step of `generate` without a KV cache,
        counts once.

        Returns:
            A table with the columns

            - run: which call of `generate`, or forward pass outside it, from 0
            - row, position: row of the batch; position in the row, absolute and without padding
            - token, text: id and text of the token at that position, where known
            - layer, head, method, target
            - delta_norm, query_norm, relative_change: norm of the change, of the query, their ratio
            - loss_before, loss_after, lowering_steps: the objective's loss; share of the steps
              that lowered it (missing where the steerer has no objective)
            - distance_before.C, distance_after.C: Euclidean distance to the centroid of class C
            - posterior_before.C, posterior_after.C: softmax over the classes of -distance^2 / 2T
            - nearest_before, nearest_after: the class whose centroid is nearest
            - n_latents_moved, latents_moved: how many latents moved, and those that moved most, as
              a tuple of (latent, change), furthest first

        Raises:
            ValueError: the steer was applied without `record=True`.
        """
        if not self.recording:
            raise ValueError(
                "this steer was not recorded: use `with steerer.apply(model, record=True) as trace`"
            )
        if not self.records:
            return pd.DataFrame(columns=[*_KEYS, "target", "delta_norm", "relative_change"])
        table = pd.concat([self._table(record) for record in self.records], ignore_index=True)
        table = table.drop_duplicates(_KEYS, keep="first")
        return table.sort_values(_KEYS).reset_index(drop=True)

    def summary(self) -> pd.DataFrame:
        """Return what the steer did layer by layer: one row for each layer, means over the rest.

        Returns:
            A table with the columns layer, n_tokens (steered tokens), relative_change, loss_before,
            loss_after, and nearest_is_target_before and nearest_is_target_after (share of tokens
            and heads whose nearest centroid is the target's). A loss that fell says that the
            descent worked; whether the text follows is up to the site.

        Raises:
            ValueError: the steer was applied without `record=True`.
        """
        table = self.to_dataframe()
        wanted = {
            "n_tokens": (
                "position",
                lambda p: len(table.loc[p.index, _KEYS[:3]].drop_duplicates()),
            ),
            "relative_change": ("relative_change", "mean"),
            "loss_before": ("loss_before", "mean"),
            "loss_after": ("loss_after", "mean"),
            "nearest_is_target_before": ("is_target_before", "mean"),
            "nearest_is_target_after": ("is_target_after", "mean"),
        }
        for when in ("before", "after"):
            if f"nearest_{when}" in table.columns:
                table[f"is_target_{when}"] = table[f"nearest_{when}"] == table["target"]
        there = {name: how for name, how in wanted.items() if how[0] in table.columns}
        return table.groupby("layer", as_index=False).agg(**there)

    def attention_change(self, model: Any) -> pd.DataFrame:
        """Return how much attention each token got from the steered ones, with and without it.

        The texts are read once more without the steerer: `attention_before` is what the same head
        paid to the same token there. Where one layer is steered, that is the attention of the
        query as it was; where several are, all of them are as they were.

        Args:
            model: the model that was steered, outside the `with` block.

        Returns:
            A row for each steered token, layer, head and token that it can look at, with run,
            row, position, layer, head, source_position, source_token, source_text (where there is a
            tokenizer), attention_before, attention_after, change. Of a head's changes the sum is 0.

        Raises:
            ValueError: the steer was applied without `record_attention=True`, nothing was steered,
                or the model is steered still.
        """
        if not self.attention.records:
            raise ValueError(
                "no attention was recorded: use `with steerer.apply(model, record_attention=True) "
                "as trace`, and steer some token of a text in it"
            )
        return self.attention.change(model, self.tokenizer)

    def to_html(self, value: str = "relative_change") -> str:
        """Return the steered text, each token coloured by how much it was steered.

        A notebook shows it by itself where the trace is the last expression of a cell. Pointing at
        a token tells its position, its relative change, and the nearest class before and after.

        Args:
            value: the column of `to_dataframe` that colours: its mean over layers and heads.

        Returns:
            HTML without scripts, in ASCII, that stands alone.

        Raises:
            ValueError: the steer was applied without `record=True`, or there is no such column.
        """
        return text_html(self.to_dataframe(), value)

    def _repr_html_(self) -> str:
        try:
            return self.to_html()
        except ValueError as error:
            return note_html(str(error))

    def _target_of(self, rows: np.ndarray) -> Any:
        """Return the target, that of each row where the rows have their own."""
        return np.array(self.row_targets, dtype=object)[rows] if self.row_targets else self.target

    def _table(self, record: TraceRecord) -> pd.DataFrame:
        n_tokens, n_heads = record.query_norm.shape
        change = record.change
        delta_norm = change.delta.double().norm(dim=-1).cpu()
        query_norm = record.query_norm.double().cpu()

        def per_token(values: Tensor) -> np.ndarray:
            return np.repeat(values.cpu().numpy(), n_heads)

        columns: dict[str, Any] = {
            "run": record.run,
            "row": per_token(record.row),
            "position": per_token(record.position),
            "layer": record.layer,
            "head": np.tile(record.heads.cpu().numpy(), n_tokens),
            "method": self.method,
            "target": self._target_of(per_token(record.row)),
        }
        if record.token is not None:
            columns["token"] = per_token(record.token)
            if self.tokenizer is not None:
                texts = [self.tokenizer.decode([int(t)]) for t in record.token]
                columns["text"] = np.repeat(np.array(texts, dtype=object), n_heads)
        columns |= {
            "delta_norm": delta_norm.flatten().numpy(),
            "query_norm": query_norm.flatten().numpy(),
            "relative_change": (delta_norm / query_norm.clamp(min=1e-30)).flatten().numpy(),
        }
        if change.loss is not None:
            loss = change.loss.double().cpu()
            columns["loss_before"] = loss[0].flatten().numpy()
            columns["loss_after"] = loss[-1].flatten().numpy()
            if len(loss) > 1:
                lowered = (loss.diff(dim=0) < 0).double().mean(0)
                columns["lowering_steps"] = lowered.flatten().numpy()
        for when, distance in (
            ("before", change.distance_before),
            ("after", change.distance_after),
        ):
            if distance is not None:
                distance = distance.double().cpu().flatten(0, 1)
                for name, values in zip(self.classes, distance.T, strict=True):
                    columns[f"distance_{when}.{name}"] = values.numpy()
                names = np.array([str(name) for name in self.classes], dtype=object)
                columns[f"nearest_{when}"] = names[distance.argmin(1).numpy()]
                posterior = (-distance.square() / (2 * change.temperature)).softmax(1)
                for name, values in zip(self.classes, posterior.T, strict=True):
                    columns[f"posterior_{when}.{name}"] = values.numpy()
        if change.n_moved is not None:
            columns["n_latents_moved"] = change.n_moved.flatten().numpy()
        if change.moved_latents is not None and change.moved_by is not None:
            columns["latents_moved"] = _moved(change.moved_latents, change.moved_by)
        return pd.DataFrame(columns)


def _moved(latents: Tensor, by: Tensor) -> np.ndarray:
    """Return, for each token and head, the latents that moved with what they moved by."""
    pairs = zip(latents.flatten(0, 1).tolist(), by.flatten(0, 1).tolist(), strict=True)
    cells = np.empty(latents.shape[0] * latents.shape[1], dtype=object)
    for place, (indices, changes) in enumerate(pairs):
        cells[place] = tuple((i, x) for i, x in zip(indices, changes, strict=True) if x != 0)
    return cells


_KEYS = ["run", "row", "position", "layer", "head"]
