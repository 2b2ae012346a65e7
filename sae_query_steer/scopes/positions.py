"""Where the columns of a forward pass stand in their rows: one vocabulary for spans and scopes.

Positions are absolute and without padding: the first real token of a row is 0 whatever padding
stands before it, and a decode step with a KV cache has the position that the token really has. So a
scope means the same with the cache on and off, in a batch and row by row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

PromptLengths: TypeAlias = int | Sequence[int] | Tensor
"""Tokens of the prompt (BOS included, padding not): one number for all rows, or one for each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Positions:
    """Where each column of a forward pass stands in its own row."""

    index: Int[Tensor, "batch pos"]
    """Absolute position of each column, counted without padding; 0 is the row's first token."""

    valid: Bool[Tensor, "batch pos"]
    """False where the column is padding."""

    prompt_lengths: Int[Tensor, " batch"] | None = None
    """Tokens of the prompt in each row (BOS included); None if unknown."""

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
"""Any function from `Positions` to a boolean tensor [batch pos]; `named` and `marked` have some."""

Span: TypeAlias = Scope
"""A scope that says where centroids are taken."""


def select(scope: Scope, positions: Positions) -> Bool[Tensor, "batch pos"]:
    """Return the real columns that a scope names.

    Args:
        scope: a scope of this module, or a user's function of the same form.
        positions: where the columns of this forward pass stand.

    Returns:
        A mask over [batch pos] in which padding is always False.

    Raises:
        TypeError: the scope returned something other than a boolean tensor.
        ValueError: its shape is not [batch pos], or it needs prompt lengths that are unknown.

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
        ValueError: they are unknown.
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


def fixed_positions(
    batch: int,
    n_pos: int,
    device: torch.device,
    prompt_lengths: PromptLengths | None,
    attention_mask: Tensor | None,
    tokens: Tensor | None = None,
) -> Positions:
    """Return the positions of one forward pass over whole rows, without a cache.

    Raises:
        ValueError: mask, prompt lengths or tokens don't fit the rows, as when a decode step with a
            KV cache sees one column of a row.
    """
    if attention_mask is None:
        valid = torch.ones(batch, n_pos, dtype=torch.bool, device=device)
    elif attention_mask.shape != (batch, n_pos):
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)} does not fit a forward pass of "
            f"[batch pos] = {[batch, n_pos]}: fwd_hooks sees whole rows; inside generate use apply"
        )
    else:
        valid = attention_mask.bool().to(device)
    lengths = as_lengths(prompt_lengths)
    if lengths is not None:
        lengths = expand_lengths(lengths, batch).to(device)
        check_lengths(lengths, valid)
    if tokens is not None and tokens.shape != (batch, n_pos):
        raise ValueError(
            f"tokens of shape {list(tokens.shape)} do not fit a forward pass of [batch pos] = "
            f"{[batch, n_pos]}: fwd_hooks sees whole rows; inside generate use apply"
        )
    return Positions(
        index=valid.long().cumsum(1) - 1,
        valid=valid,
        prompt_lengths=lengths,
        tokens=None if tokens is None else by_position(tokens.to(device), valid),
    )


def by_position(
    tokens: Int[Tensor, "batch total"], columns: Bool[Tensor, "batch total"]
) -> Int[Tensor, "batch total"]:
    """Return tokens by absolute position: padding left out, -1 after the row's last token.

    Args:
        tokens: ids of all columns of the rows so far, padding included.
        columns: False where a column is padding.
    """
    index = torch.where(columns, columns.long().cumsum(1) - 1, tokens.shape[1])  # padding: beyond
    by_position = torch.full((len(tokens), tokens.shape[1] + 1), -1).to(tokens)
    return by_position.scatter(1, index, tokens)[:, :-1]


def as_lengths(lengths: PromptLengths | None) -> Int[Tensor, " batch"] | None:
    """Return prompt lengths as a tensor.

    Raises:
        ValueError: a length is below 1, or they are not whole numbers in one row.
    """
    if lengths is None:
        return None
    tensor = (
        torch.as_tensor(lengths).reshape(-1)
        if isinstance(lengths, int)
        else torch.as_tensor(lengths)
    )
    if tensor.ndim != 1 or tensor.is_floating_point() or len(tensor) == 0 or int(tensor.min()) < 1:
        raise ValueError(
            f"prompt_lengths={lengths!r} is not allowed: give one whole number of 1 or more for "
            "each row (BOS included, padding not)"
        )
    return tensor.long()


def expand_lengths(lengths: Int[Tensor, " n"], batch: int) -> Int[Tensor, " batch"]:
    """Return one length for each row; a single length serves all.

    Raises:
        ValueError: there are neither one nor `batch` of them.
    """
    if len(lengths) == 1:
        return repeat(lengths, "1 -> b", b=batch)
    if len(lengths) != batch:
        raise ValueError(
            f"prompt_lengths has {len(lengths)} entries: the forward pass has {batch} rows"
        )
    return lengths


def check_lengths(lengths: Int[Tensor, " batch"], columns: Bool[Tensor, "batch total"]) -> None:
    """Raise if a prompt is said to be longer than its row is so far.

    Raises:
        ValueError: the message gives both.
    """
    if bool((lengths > columns.sum(1)).any()):
        raise ValueError(
            f"prompt_lengths={lengths.tolist()} exceed rows of {columns.sum(1).tolist()} tokens: "
            "give the tokens of each row's prompt. (fwd_hooks sees whole rows without a KV cache: "
            "inside generate use apply)"
        )
