"""Scopes that a user marks: explicit positions, a mask for each row, what follows a marker token.

All join with `|`, `&` and `~`, and all mean absolute positions without padding, as in `positions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_query_steer.scopes.joins import Cuts, Joinable
from sae_query_steer.scopes.named import check_whole_number
from sae_query_steer.scopes.positions import Positions, check_rows, known_tokens


@dataclass(frozen=True)
class AtPositions(Joinable):
    """Explicit positions: `AtPositions([3, 7])` in every row, `AtPositions([[3], [5, 6]])` by row.

    A position that a row never reaches is not steered.
    """

    positions: Sequence[int] | Sequence[Sequence[int]] | Tensor
    """Absolute positions, the same for all rows, or a list for each row of the batch, in order."""

    def __post_init__(self) -> None:
        given: Any = _as_list(self.positions)
        if not isinstance(given, list):
            raise TypeError(
                f"AtPositions({given!r}) is not allowed: give a list of positions, such as [3, 7], "
                "or a list of lists, one for each row"
            )
        given = [_as_list(part) for part in given]
        by_row = [isinstance(part, list) for part in given]
        if any(by_row) and not all(by_row):
            raise TypeError(
                f"AtPositions({given!r}) mixes positions and lists of them: give positions for all "
                "rows, or a list for each row"
            )
        name = f"AtPositions({given!r})"
        rows = [
            tuple(check_whole_number(name, "a position", number, at_least=0) for number in row)
            for row in (given if any(by_row) else [given])
        ]
        if not any(rows):
            raise ValueError(f"{name} names no position: give at least one")
        object.__setattr__(self, "positions", tuple(rows) if any(by_row) else rows[0])

    def _cuts(self) -> Cuts | None:
        if self._by_row:
            return None
        own: Any = self.positions
        return Cuts(absolute=frozenset(end for p in own for end in (p, p + 1)))

    @property
    def _by_row(self) -> bool:
        return isinstance(self.positions[0], tuple)

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the columns at these positions.

        Raises:
            ValueError: there is a list for each row, of another number of rows.
        """
        index = positions.index
        if not self._by_row:
            return torch.isin(index, index.new_tensor(self.positions))
        check_rows(positions, self, len(self.positions))
        rows = zip(index, self.positions, strict=True)
        return torch.stack([torch.isin(row, index.new_tensor(own)) for row, own in rows])


@dataclass(frozen=True, eq=False, repr=False)
class RowMask(Joinable):
    """A mask of its own for each row of the batch: True where to steer.

    Columns of the mask are absolute positions without padding, so the mask of a row is the same
    whatever prompts stand beside it. What is generated beyond its width is not steered.
    """

    mask: Bool[Tensor, "batch length"]
    """One row for each row of the batch, in order."""

    def __post_init__(self) -> None:
        mask: Any = self.mask
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
            came = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise TypeError(
                f"RowMask({came}) is not allowed: give a boolean tensor [batch, positions], "
                "such as tokens == marker"
            )
        if not bool(mask.any()):
            raise ValueError(
                f"the RowMask of {list(mask.shape)} names no position: it is False everywhere"
            )
        object.__setattr__(self, "mask", mask.detach().clone())

    def __repr__(self) -> str:
        rows, width = self.mask.shape
        return f"RowMask({rows} rows of {width}, {int(self.mask.sum())} positions)"

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the columns at whose position the mask is True.

        Raises:
            ValueError: the batch has another number of rows.
        """
        check_rows(positions, self, len(self.mask))
        index, width = positions.index, self.mask.shape[1]
        inside = (index >= 0) & (index < width)
        marked = self.mask.to(index.device).gather(1, index.clamp(0, width - 1))
        return inside & marked


@dataclass(frozen=True)
class AfterToken(Joinable):
    """Every token after a row's first marker, in the prompt or in what is generated.

    A row without the marker is not steered. Padding is no marker, though its id may be.
    """

    token: int | Sequence[int] | Tensor
    """Id of the marker, or several ids of which any one is a marker."""

    inclusive: bool = False
    """Whether the marker counts too."""

    needs_tokens: ClassVar[bool] = True
    """It reads `Positions.tokens`."""

    def __post_init__(self) -> None:
        ids: Any = _as_list(self.token)
        ids, name = ids if isinstance(ids, list) else [ids], f"AfterToken({ids!r})"
        if not ids:
            raise ValueError(f"{name} has no marker: give at least one id")
        remedy = "text becomes ids by model.to_tokens or the tokenizer"
        own = (check_whole_number(name, "an id", i, at_least=0, remedy=remedy) for i in ids)
        object.__setattr__(self, "token", tuple(own))

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the columns behind the row's first marker."""
        tokens = known_tokens(positions, self)
        marker = torch.isin(tokens, tokens.new_tensor(self.token))
        seen = marker.any(1)
        first = marker.long().argmax(1) + (0 if self.inclusive else 1)
        return seen[:, None] & (positions.index >= first[:, None])


def _as_list(value: Any) -> Any:
    """Return a sequence, tensor or array as a list, and anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
