"""Where the columns of a forward pass stand in their rows: one vocabulary for spans and scopes.

Positions are absolute and without padding: the first real token of a row is 0 whatever padding
stands before it, and a decode step with a KV cache has the position that the token really has. So a
scope means the same with the cache on and off, in a batch and row by row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
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

    def of_rows(self, columns: Bool[Tensor, "batch total"]) -> "Positions":
        """Return the positions of all tokens of the rows so far, a column for each position.

        Args:
            columns: False where a column of the rows so far is padding.
        """
        index = torch.arange(columns.shape[1], device=columns.device).expand(columns.shape)
        return replace(self, index=index, valid=index < columns.sum(1, keepdim=True))


class ByRow(NamedTuple):
    """Some tokens as a table of the rows that have any."""

    rows: Int[Tensor, " some"]
    """These rows."""

    row: Int[Tensor, " token"]
    """Place of each token's row among them."""

    place: Int[Tensor, " token"]
    """Place of each token among those of its row."""

    most: int
    """Most tokens of a row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenPositions:
    """Some tokens of a forward pass, row by row: a selection of its `Positions`."""

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

    def index(self, heads: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return where they and some heads are in activations [batch pos head d_head]."""
        assert self.column is not None, "tokens of a forward pass have columns"
        return self.row[:, None], self.column[:, None], torch.tensor(heads, device=self.row.device)

    @cached_property
    def by_row(self) -> ByRow:
        """The tokens as a table of their rows."""
        rows, row, counts = self.row.unique_consecutive(return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(row), device=row.device) - first[row]
        return ByRow(rows, row, place, int(counts.max()))

    def age(self) -> Float[Tensor, " token"]:
        """Return how many tokens lie between a token and the end of its prompt, 0 within it.

        The last prompt token has age 0, the first generated token 1.

        Raises:
            ValueError: the prompt lengths are unknown.
        """
        if self.prompt_lengths is None:
            raise ValueError(f"a schedule needs to know {NO_PROMPT}")
        lengths = self.prompt_lengths.to(self.position.device)[self.row]
        return (self.position - lengths + 1).clamp(min=0).float()


Scope: TypeAlias = Callable[[Positions], Tensor]
"""Any function from `Positions` to a boolean tensor [batch pos]; `named` and `marked` have some."""

Span: TypeAlias = Scope
"""A scope that says where centroids are taken."""

NO_PROMPT = (
    "where the prompt ends, and this forward pass does not come from generate() or "
    "generate_stream(): pass prompt_lengths=[...], the tokens of each row's prompt with BOS"
)


def select(scope: Scope, positions: Positions) -> Bool[Tensor, "batch pos"]:
    """Return the real columns that a scope names: a mask in which padding is always False.

    Raises:
        ValueError: the scope did not return a boolean tensor [batch pos], or it needs prompt
            lengths or tokens that are unknown.
    """
    valid = positions.valid
    return check_result(scope(positions), valid.shape, f"the mask of {scope!r}", torch.bool) & valid


def check_result(
    value: Tensor, shape: torch.Size, name: str, dtype: torch.dtype | None = None
) -> Tensor:
    """Return what a user's function returned, if it is a tensor of this shape.

    Raises:
        ValueError: it is not; a tensor of another shape would be broadcast.
    """
    if isinstance(value, Tensor) and value.shape == shape and dtype in (None, value.dtype):
        return value
    given = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    wanted = "" if dtype is None else f"{dtype} "
    raise ValueError(f"{name} must be a {wanted}tensor of shape {list(shape)}, got {given}")


def check_rows(name: object, have: int, rows: int) -> None:
    """Raise unless there is something for every row of a batch.

    Raises:
        ValueError: the message gives both numbers.
    """
    if have != rows:
        raise ValueError(
            f"{name} is for {have} rows, the batch has {rows}: give all prompts in one call of "
            "generate(), in order"
        )


def fixed_positions(
    activation: Tensor,
    prompt_lengths: PromptLengths | None,
    attention_mask: Tensor | None,
    tokens: Tensor | None = None,
) -> Positions:
    """Return the positions of one forward pass over whole rows, without a cache.

    Args:
        activation: [batch pos ...].
        prompt_lengths: of each row; None if unknown.
        attention_mask: 0 where a column is padding, [batch pos]; None means no padding.
        tokens: ids [batch pos]; None if unknown.

    Raises:
        ValueError: mask, prompt lengths or tokens don't fit the rows, as when a decode step with a
            KV cache sees one column of a row.
    """
    shape, device = activation.shape[:2], activation.device
    for name, value in (("attention_mask", attention_mask), ("tokens", tokens)):
        if value is not None and value.shape != shape:
            raise ValueError(
                f"{name} must have the shape of the forward pass, {list(shape)}, got "
                f"{list(value.shape)}: fwd_hooks sees whole rows; inside generate use apply"
            )
    valid = torch.ones(shape) if attention_mask is None else attention_mask
    valid = valid.bool().to(device)
    lengths = as_lengths(prompt_lengths)
    return Positions(
        index=valid.long().cumsum(1) - 1,
        valid=valid,
        prompt_lengths=None if lengths is None else row_lengths(lengths, valid),
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
    """Return prompt lengths as a tensor, or raise ValueError unless they are counts of tokens."""
    if lengths is None:
        return None
    tensor = torch.atleast_1d(torch.as_tensor(lengths))
    if tensor.ndim != 1 or tensor.is_floating_point() or len(tensor) == 0 or int(tensor.min()) < 1:
        raise ValueError(
            "prompt_lengths must be one whole number of 1 or more for each row (BOS included, "
            f"padding not), got {lengths!r}"
        )
    return tensor.long()


def row_lengths(
    lengths: Int[Tensor, " n"], columns: Bool[Tensor, "batch total"]
) -> Int[Tensor, " batch"]:
    """Return one prompt length for each row; a single one serves all.

    Args:
        lengths: of `as_lengths`.
        columns: False where a column of the rows so far is padding.

    Raises:
        ValueError: there are more or fewer than rows, or one is longer than its row so far.
    """
    if len(lengths) not in (1, len(columns)):
        raise ValueError(
            f"prompt_lengths has {len(lengths)} entries: the forward pass has {len(columns)} rows"
        )
    lengths = lengths.expand(len(columns)).to(columns.device)
    if bool((lengths > columns.sum(1)).any()):
        raise ValueError(
            f"prompt_lengths={lengths.tolist()} exceed rows of {columns.sum(1).tolist()} tokens: "
            "give the tokens of each row's prompt. (fwd_hooks sees whole rows without a KV cache: "
            "inside generate use apply)"
        )
    return lengths
