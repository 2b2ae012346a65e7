"""Where the tokens stand whose queries are changed."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenPlaces:
    """Row and position of the scoped tokens of one forward pass, in the order of their queries."""

    row: Int[Tensor, " token"]
    """Row of the batch."""

    position: Int[Tensor, " token"]
    """Position in the row, absolute and without padding."""

    n_rows: int
    """Rows of the batch."""

    prompt_lengths: Int[Tensor, " batch"] | None = None
    """Tokens of each row's prompt; None where nobody said so."""

    @classmethod
    def one_a_row(cls, n_rows: int) -> "TokenPlaces":
        """Return places of one token in each row, at its position 0: for a look at a steerer."""
        rows = torch.arange(n_rows)
        return cls(row=rows, position=torch.zeros_like(rows), n_rows=n_rows)

    def age(self) -> Float[Tensor, " token"]:
        """Return how many tokens lie between a token and the end of its prompt, 0 within it.

        The last prompt token has age 0, the first token that is generated 1.

        Raises:
            ValueError: nobody said where the prompt ends.
        """
        if self.prompt_lengths is None:
            raise ValueError(
                "a schedule must know where the prompt ends, and this forward pass did not come "
                "from generate() or generate_stream(): pass prompt_lengths=[...]"
            )
        lengths = self.prompt_lengths.to(self.position.device)[self.row]
        return (self.position - lengths + 1).clamp(min=0).float()

    def cpu(self) -> "TokenPlaces":
        """Return a copy on the CPU."""
        lengths = self.prompt_lengths
        return TokenPlaces(
            row=self.row.cpu(),
            position=self.position.cpu(),
            n_rows=self.n_rows,
            prompt_lengths=None if lengths is None else lengths.cpu(),
        )

    def at(self, tokens: Tensor) -> "TokenPlaces":
        """Return the places of some of the tokens, by their indices."""
        return TokenPlaces(
            row=self.row[tokens],
            position=self.position[tokens],
            n_rows=self.n_rows,
            prompt_lengths=self.prompt_lengths,
        )
