"""How long each row's prompt is, where the user says so; and the positions of whole rows."""

from collections.abc import Sequence

import torch
from einops import repeat
from jaxtyping import Bool, Int
from torch import Tensor

from sae_query_steer.scopes.columns import Positions

PromptLengths = int | Sequence[int] | Tensor
"""Tokens of the prompt (BOS included, padding not): one number for all rows, or one for each."""


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
