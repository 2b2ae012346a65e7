"""Attention scores of some tokens as a function of their queries, in a running forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.descent.attention import visible
from sae_query_steer.scopes.positions import ByRow, TokenPositions

Turn = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]
"""Rotary embedding: cosines and sines [batch or 1, pos, d_rotary], and what swaps the halves."""


class ScoreParts(NamedTuple):
    """What attention makes scores of queries with."""

    keys: Float[Tensor, "batch group key d_head"]
    """Rotated and times the scale; heads in groups share them."""

    turn: Turn | None
    """Rotary embedding of the queries; None if there is none after the site."""

    norm: Callable[[Tensor], Tensor] | None
    """Norm of the queries after the site; None if there is none."""

    cap: float | None
    """Soft cap of the scores; None if there is none."""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of some tokens and heads in a forward pass, as a function of their queries."""

    now: Float[Tensor, "token head key"]
    """The scores of the queries as they are; minus infinity where a mask hides the key."""

    _by_row: ByRow
    _keys: Float[Tensor, "row_group key d_head"]
    _keys_by_column: Float[Tensor, "row_group d_head key"]
    """The same in the layout in which the other product is fast."""

    _turns: Float[Tensor, "token d_head d_head"] | None
    """The rotary embedding of each token; None without, and where the keys have it."""

    _queries: Float[Tensor, "token head d_head"]
    _parts: ScoreParts

    @classmethod
    def of(
        cls,
        scores: Float[Tensor, "batch head pos key"],
        queries: Float[Tensor, "batch pos head d_head"],
        parts: ScoreParts,
        tokens: TokenPositions,
        heads: Sequence[int],
    ) -> "TokenScores":
        """Return the scores of some tokens and heads; `scores` are those of `queries`."""
        dtype, n_heads = torch.promote_types(scores.dtype, torch.float32), scores.shape[1]
        keys, rows = parts.keys, tokens.by_row.rows
        if (n_rows := len(rows)) != len(keys):
            keys = keys[rows]
        if tuple(heads) != tuple(range(n_heads)):
            group = n_heads // keys.shape[1]
            keys = keys[:, [head // group for head in heads]]
        keys = keys.to(dtype).flatten(0, 1).contiguous()
        turns = None
        if parts.turn is not None:
            cos, sin, flip = parts.turn
            row = tokens.row if len(cos) > 1 else 0
            turns = _matrices(
                cos[row, tokens.column].to(dtype),
                sin[row, tokens.column].to(dtype),
                flip,
                keys.shape[-1],
            )
        by_column = keys.mT.contiguous()
        if turns is not None and len(turns) == n_rows:  # once, and not at each change
            by_column = torch.bmm(turns.repeat_interleave(len(keys) // n_rows, 0), by_column)
            keys, turns = by_column.mT.contiguous(), None
        now = visible(picked(scores.transpose(1, 2), tokens, heads))
        # Copies, because the tokens may have been found in inference mode, which autograd refuses.
        places = {name: getattr(tokens.by_row, name).clone() for name in ("row", "place")}
        by_row, queries = tokens.by_row._replace(**places), picked(queries, tokens, heads)
        return cls(now, by_row, keys, by_column, turns, queries, parts)

    @property
    def is_linear(self) -> bool:
        """Whether scores are linear in the queries: `change` and `slope` are for these."""
        return self._parts.norm is None and self._parts.cap is None

    def added(self, queries: Float[Tensor, "token head d_head"]) -> Float[Tensor, "token head key"]:
        """Return what other queries, in the place of the present ones, add to the scores."""
        return self._unmasked(queries) - self.unmasked

    @cached_property
    def unmasked(self) -> Float[Tensor, "token head key"]:
        """The scores of the queries as they are, without masks and without what edits added."""
        return self._unmasked(self._queries)

    def _unmasked(self, queries: Tensor) -> Tensor:
        norm, cap = self._parts.norm, self._parts.cap
        found = self.change(queries if norm is None else norm(queries))
        return found if cap is None else (found / cap).tanh() * cap

    def change(self, delta: Float[Tensor, "token head d_head"]) -> Float[Tensor, "token head key"]:
        """Return what a change of the queries adds to the scores."""
        delta = delta.to(self._keys.dtype)
        turned = delta if self._turns is None else torch.bmm(delta, self._turns)
        return self._times(turned, self._keys_by_column)

    def slope(self, pull: Float[Tensor, "token head key"]) -> Float[Tensor, "token head d_head"]:
        """Return the gradient in the queries from that in the scores."""
        turned = self._times(pull, self._keys)
        return turned if self._turns is None else torch.bmm(turned, self._turns.mT)

    def _times(self, x: Tensor, keys: Tensor) -> Tensor:
        n_tokens, n_heads, size = x.shape
        rows, row, place, most = self._by_row
        if n_tokens == len(rows):
            return torch.bmm(x.reshape(len(keys), -1, size), keys).view(n_tokens, n_heads, -1)
        grid = x.new_zeros(len(rows), most, n_heads, size)
        grid[row, place] = x
        groups = grid.view(len(rows), most, -1, n_heads * len(rows) // len(keys), size)
        found = torch.bmm(groups.transpose(1, 2).reshape(len(keys), -1, size), keys)
        found = found.view(len(rows), -1, most, groups.shape[3], keys.shape[-1])
        return found.transpose(1, 2).flatten(2, 3)[row, place]


def _matrices(cos: Tensor, sin: Tensor, flip: Callable[[Tensor], Tensor], d_head: int) -> Tensor:
    """Return rotary embeddings [token d_rotary] as matrices [token d_head d_head]."""
    n, eye = cos.shape[-1], torch.eye(d_head, dtype=cos.dtype, device=cos.device)
    turned = eye[:n, :n] * cos[:, None] + flip(eye[:n, :n]) * sin[:, None]
    if n == d_head:
        return turned
    matrices = eye.repeat(len(cos), 1, 1)
    matrices[:, :n, :n] = turned
    return matrices


def picked(
    values: Float[Tensor, "batch pos head size"], tokens: TokenPositions, heads: Sequence[int]
) -> Float[Tensor, "token head size"]:
    """Return the values of some tokens and heads."""
    if is_all(values, tokens, heads):
        return values.flatten(0, 1)
    return values[tokens.index(heads)]


def put(
    values: Float[Tensor, "batch pos head size"],
    tokens: TokenPositions,
    heads: Sequence[int],
    new: Float[Tensor, "token head size"],
) -> Float[Tensor, "batch pos head size"]:
    """Return values with new ones of some tokens and heads."""
    if is_all(values, tokens, heads):
        return new.view(values.shape)
    return values.index_put(tokens.index(heads), new)


def is_all(values: Tensor, tokens: TokenPositions, heads: Sequence[int]) -> bool:
    """Return whether these are all tokens and heads, as in most decode steps."""
    n_rows, n_pos, n_heads = values.shape[:3]
    return len(tokens.row) == n_rows * n_pos and tuple(heads) == tuple(range(n_heads))
