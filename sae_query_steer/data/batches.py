"""Batches of tokenised examples and of token rows, with a progress bar."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_query_steer.data.tokenized import TokenizedExample
from sae_query_steer.progress import progress_bar
from sae_query_steer.scopes.positions import Positions, Span, by_position, select

PAD = -1
"""Marks padding in token rows; no token has this id."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Examples as the rows of one tensor, padded on the right."""

    tokens: Int[Tensor, "batch pos"]
    """Ids; padding has id 0."""

    lengths: Int[Tensor, " batch"]
    """Tokens of each row without padding."""

    prompt_lengths: Int[Tensor, " batch"]
    """Tokens of the prompt of each row."""

    labels: tuple[str, ...]
    """Class of each row."""

    indices: tuple[int, ...]
    """Index of each row in the sequence that was batched."""

    @property
    def positions(self) -> Positions:
        """Where the columns stand in their rows."""
        index = torch.arange(self.tokens.shape[1]).expand(self.tokens.shape)
        valid = index < self.lengths[:, None]
        return Positions(
            index=index,
            valid=valid,
            prompt_lengths=self.prompt_lengths,
            lengths=self.lengths,
            tokens=by_position(self.tokens, valid),
        )

    def mask(self, span: Span) -> Bool[Tensor, "batch pos"]:
        """Return which tokens are in a span.

        Raises:
            ValueError: a row has no token in it.
        """
        mask = select(span, self.positions)
        if not bool(mask.any(1).all()):
            row = int((~mask.any(1)).nonzero()[0])
            prompt = int(self.prompt_lengths[row])
            raise ValueError(
                f"example {self.indices[row]} ({self.labels[row]!r}) has no token in the span "
                f"{span!r}: its prompt has {prompt} tokens and its response "
                f"{int(self.lengths[row]) - prompt}"
            )
        return mask


def example_batches(
    examples: Sequence[TokenizedExample], batch_size: int, description: str | None = None
) -> Iterator[TokenBatch]:
    """Yield batches, shortest examples first, so that there is little padding.

    Args:
        examples: each comes once; those of equal length keep their order.
        batch_size: rows of a batch, 1 or more; the last batch may have fewer.
        description: of the progress bar; None shows none.
    """
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    with progress_bar(
        total=len(order), desc=description, unit="text", disable=description is None
    ) as bar:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            rows = [examples[index] for index in indices]
            yield TokenBatch(
                tokens=pad_sequence([row.tokens for row in rows], batch_first=True),
                lengths=torch.tensor([len(row.tokens) for row in rows]),
                prompt_lengths=torch.tensor([row.prompt_length for row in rows]),
                labels=tuple(row.label for row in rows),
                indices=tuple(indices),
            )
            bar.update(len(rows))


class RowBatch(NamedTuple):
    """Some token rows, cut after the longest of them."""

    start: int
    """Index of the first row."""

    tokens: Int[Tensor, "batch pos"]
    """Ids; padding has id 0."""

    real: Bool[Tensor, "batch pos"]
    """False where the column is padding."""


def row_batches(
    rows: Int[Tensor, "row pos"], batch_size: int, description: str
) -> Iterator[RowBatch]:
    """Yield token rows in batches, in their order.

    Args:
        rows: ids, filled up with `PAD` on the right.
        batch_size: rows of a batch, 1 or more.
        description: of the progress bar.
    """
    with progress_bar(total=len(rows), desc=description, unit="row") as bar:
        for start in range(0, len(rows), batch_size):
            tokens = rows[start : start + batch_size].long()
            real = tokens != PAD
            width = max(1, int(real.sum(1).max()))
            yield RowBatch(start, tokens[:, :width].clamp(min=0), real[:, :width])
            bar.update(len(tokens))
