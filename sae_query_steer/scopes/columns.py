"""Where the columns of a forward pass stand, and what a scope may ask of them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Positions:
    """Where each column of a forward pass stands in its own row."""

    index: Int[Tensor, "batch pos"]
    """Absolute position of each column, counted without padding; 0 is the row's first token."""

    valid: Bool[Tensor, "batch pos"]
    """False where the column is padding."""

    prompt_lengths: Int[Tensor, " batch"] | None = None
    """Tokens of the prompt in each row (BOS included); None where nobody said so."""

    lengths: Int[Tensor, " batch"] | None = None
    """Tokens of the whole row; None while the row is still being generated."""

    tokens: Int[Tensor, "batch length"] | None = None
    """Ids of all tokens of each row so far, by absolute position and so without padding, -1 after
    the row's last; a decode step sees those before it too. None where they are not known."""

    def tokens_at(self, mask: Bool[Tensor, "batch pos"]) -> "TokenPositions":
        """Return the tokens of the columns where a mask is True, row by row."""
        rows, columns = mask.nonzero(as_tuple=True)
        return TokenPositions(
            row=rows,
            position=self.index[rows, columns],
            n_rows=len(mask),
            prompt_lengths=self.prompt_lengths,
            column=columns,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenPositions:
    """Some tokens of a forward pass, such as those in a scope: a selection of its `Positions`."""

    row: Int[Tensor, " token"]
    """Row of the batch."""

    position: Int[Tensor, " token"]
    """Position in the row, absolute and without padding."""

    n_rows: int
    """Rows of the batch."""

    prompt_lengths: Int[Tensor, " batch"] | None = None
    """Tokens of each row's prompt; None if unknown."""

    column: Int[Tensor, " token"] | None = None
    """Column of the forward pass; None outside one."""

    @classmethod
    def one_per_row(cls, n_rows: int) -> "TokenPositions":
        """Return one token in each row, at position 0: to call an edit outside a model."""
        rows = torch.arange(n_rows)
        return cls(row=rows, position=torch.zeros_like(rows), n_rows=n_rows)

    def age(self) -> Float[Tensor, " token"]:
        """Return how many tokens lie between a token and the end of its prompt, 0 within it.

        The last prompt token has age 0, the first generated token 1.

        Raises:
            ValueError: the prompt lengths are unknown.
        """
        if self.prompt_lengths is None:
            raise ValueError(
                "a schedule needs to know where the prompt ends, and this forward pass does not "
                "come from generate() or generate_stream(): pass prompt_lengths=[...]"
            )
        lengths = self.prompt_lengths.to(self.position.device)[self.row]
        return (self.position - lengths + 1).clamp(min=0).float()

    def at(self, tokens: Tensor) -> "TokenPositions":
        """Return some of the tokens, by their indices."""
        column = None if self.column is None else self.column[tokens]
        return replace(self, row=self.row[tokens], position=self.position[tokens], column=column)

    def cpu(self) -> "TokenPositions":
        """Return a copy on the CPU."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: t.cpu() for name, t in tensors.items() if isinstance(t, Tensor)}
        )


Scope: TypeAlias = Callable[[Positions], Tensor]
"""Any function from `Positions` to a boolean tensor [batch pos]; the classes here are such."""


def select(scope: Scope, positions: Positions) -> Bool[Tensor, "batch pos"]:
    """Return the real columns that a scope names.

    Args:
        scope: a scope of this module, or a user's function of the same form.
        positions: where the columns of this forward pass stand.

    Returns:
        A mask over [batch pos] in which padding is always False.

    Raises:
        TypeError: the scope returned something other than a boolean tensor.
        ValueError: its shape is not [batch pos], or it needs prompt lengths that nobody gave.

    Source: our choice.
    """
    mask = scope(positions)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"the scope {scope!r} returned {_describe(mask)}: it must return a boolean tensor "
            "of shape [batch pos]"
        )
    if mask.shape != positions.valid.shape:
        raise ValueError(
            f"the scope {scope!r} returned shape {list(mask.shape)}: this forward pass has "
            f"[batch pos] = {list(positions.valid.shape)}"
        )
    return mask & positions.valid


def known_prompt_lengths(positions: Positions, scope: object) -> Int[Tensor, " batch"]:
    """Return the prompt lengths that a scope needs.

    Raises:
        ValueError: nobody gave them.
    """
    if positions.prompt_lengths is None:
        raise ValueError(
            f"{scope!r} must know where the prompt ends, and this forward pass did not come from "
            "generate() or generate_stream(): pass prompt_lengths=[...] (tokens of each row's "
            "prompt, BOS included), or use EveryPosition()"
        )
    return positions.prompt_lengths


def known_tokens(positions: Positions, scope: object) -> Int[Tensor, "batch length"]:
    """Return the tokens that a scope needs.

    Raises:
        ValueError: they are not known.
    """
    if positions.tokens is None:
        raise ValueError(
            f"{scope!r} must know the tokens of each row from its beginning, and this forward pass "
            "does not show them: give the model text or token ids and no embeddings, begin the KV "
            "cache inside apply(), and pass tokens=[batch pos] to fwd_hooks()"
        )
    return positions.tokens


def check_rows(positions: Positions, scope: object, rows: int) -> None:
    """Raise unless a scope that differs from row to row has something for each row.

    Raises:
        ValueError: the message gives both numbers.
    """
    if rows != len(positions.index):
        raise ValueError(
            f"{scope!r} is for {rows} rows, the batch has {len(positions.index)}: give all prompts "
            "in one call of generate(), in order"
        )


def _describe(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"{type(value).__name__}"
