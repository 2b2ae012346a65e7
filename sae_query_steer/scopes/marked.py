"""Scopes that a user marks: explicit positions, a mask for each row, what follows a marker token.

All join with `|`, `&` and `~`, and all mean absolute positions without padding, as in `positions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.scopes.joins import Joinable
from sae_query_steer.scopes.positions import Positions, check_rows


@dataclass(frozen=True)
class AtPositions(Joinable):
    """Explicit positions: `AtPositions([3, 7])` in every row, `AtPositions([[3], [5, 6]])` by row.

    A position that a row never reaches is not steered.
    """

    positions: Sequence[int] | Sequence[Sequence[int]] | Tensor
    """Absolute positions, the same for all rows, or a list for each row of the batch, in order."""

    def __post_init__(self) -> None:
        given = _counts("positions", self.positions)
        if not isinstance(given, tuple) or all(row == () for row in given):
            raise ValueError(
                "positions must be a list such as [3, 7], or a list of lists, one for each row, "
                f"got {given!r}"
            )
        object.__setattr__(self, "positions", given)

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the columns at these positions.

        Raises:
            ValueError: there is a list for each row, of another number of rows.
        """
        index, own = positions.index, tuple(self.positions)
        if not isinstance(own[0], tuple):
            return torch.isin(index, index.new_tensor(own))
        check_rows(self, len(own), len(index))
        rows = zip(index, own, strict=True)
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
        mask: Any = torch.as_tensor(self.mask)
        if mask.dtype != torch.bool or mask.ndim != 2 or not mask.any():
            raise ValueError(
                "mask must be a boolean tensor [batch, positions], such as tokens == marker, and "
                f"True somewhere, got {mask.dtype} {list(mask.shape)}"
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
        index, width = positions.index, self.mask.shape[1]
        check_rows(self, len(self.mask), len(index))
        inside = (index >= 0) & (index < width)
        return inside & self.mask.to(index.device).gather(1, index.clamp(0, width - 1))


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
        ids = _counts("token", self.token)
        ids = ids if isinstance(ids, tuple) else (ids,)
        if not ids:
            raise ValueError("token must have at least one id, got none")
        object.__setattr__(self, "token", ids)

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the columns behind the row's first marker.

        Raises:
            ValueError: the tokens are not known.
        """
        tokens = positions.tokens
        if tokens is None:
            raise ValueError(
                f"{self!r} must know the tokens of each row from its beginning, and this forward "
                "pass does not show them: give the model text or token ids and no embeddings, "
                "begin the KV cache inside apply(), and pass tokens=[batch pos] to fwd_hooks()"
            )
        marker = torch.isin(tokens, tokens.new_tensor(self.token))
        first = marker.long().argmax(1) + (0 if self.inclusive else 1)
        return marker.any(1, keepdim=True) & (positions.index >= first[:, None])


def _counts(name: str, value: Any) -> Any:
    """Return whole numbers in lists, tensors or arrays, nested ones too, as tuples."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_counts(name, part) for part in value)
    check_number(name, value, whole=True, least=0)
    return value
