"""Queries of several sites in shuffled batches, of which batch k is a function of the seed and k.

SAELens's store keeps a mixing buffer and a generator's state, and its checkpoints keep neither: a
run that is taken up again reads other batches. Here nothing needs to be kept. Every epoch has its
own order of the rows; that chain of rows is cut into chunks, the tokens of a chunk are shuffled,
and batches are cut from the chain of chunks. Each order is drawn by a generator of its own, so a
stream can begin at any batch: it finds the chunk by the lengths of the rows, and reads it again.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.data.batches import PAD
from sae_query_steer.models.activations import read_activations
from sae_query_steer.sites import QuerySite

Queries = dict[str, Float[Tensor, "token d_in"]]
"""Flat queries of the same tokens, by hook name."""

_ROWS, _TOKENS = 0, 1  # which order a generator draws


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryStream:
    """An endless stream of batches of queries; the texts are read again as often as needed."""

    model: Any
    """A HookedTransformer or a TransformerBridge."""

    rows: Int[Tensor, "row pos"]
    """Token rows, `PAD` where there is no token."""

    sites: Sequence[QuerySite]
    """The sites, all served from one forward pass."""

    batch_tokens: int
    """Tokens of a batch."""

    seed: int
    """Of the order of the tokens."""

    rows_per_forward: int
    """Rows of one forward pass."""

    rows_per_chunk: int
    """Rows whose tokens are shuffled among each other; their queries are held in memory."""

    device: str
    """Where chunks are kept."""

    autocast: bool = False
    """Run the model in bfloat16 where autocast thinks it safe."""

    prefetch: bool = False
    """Read the next chunk in a thread while this one is used; it takes the memory of another."""

    def batches(self, start: int = 0) -> Generator[Queries]:
        """Yield batch `start` and all that follow, the same whatever `start` is.

        With `prefetch` the model is in use until the generator is closed.
        """
        first, skip = self._find(start * self.batch_tokens)
        size = self.batch_tokens
        left: dict[str, Tensor] = {}
        for chunk in self._chunks(first):
            n = len(next(iter(chunk.values())))
            n_left = len(next(iter(left.values()))) if left else 0
            at = skip
            if left and n_left + n - skip >= size:
                at = skip + size - n_left
                yield {name: torch.cat([left[name], chunk[name][skip:at]]) for name in chunk}
                left = {}
            while at + size <= n:
                yield {name: queries[at : at + size] for name, queries in chunk.items()}
                at += size
            # Copies, so that no view keeps the whole chunk in memory.
            rest = {name: queries[at:].clone() for name, queries in chunk.items()}
            left = {n: torch.cat([left[n], rest[n]]) for n in rest} if left else rest
            skip = 0

    def chunk_bytes(self) -> int:
        """Return the memory that a chunk takes at most."""
        d_in = sum(site.d_in for site in self.sites)
        item = next(self.model.parameters()).element_size()
        return chunk_bytes(self.rows_per_chunk, self.rows.shape[1], d_in, item)

    def _find(self, token: int) -> tuple[int, int]:
        """Return the chunk that holds a token of the chain, and how many of its tokens precede."""
        lengths = (self.rows != PAD).sum(1).numpy()
        before_epoch, epoch = (
            token // int(lengths.sum()) * len(lengths),
            token // int(lengths.sum()),
        )
        ends = np.cumsum(lengths[self._order(_ROWS, epoch, len(lengths))])
        row = before_epoch + int(np.searchsorted(ends, token - epoch * int(ends[-1]), side="right"))
        chunk = row // self.rows_per_chunk
        return chunk, token - self._tokens_before(chunk * self.rows_per_chunk, lengths)

    def _tokens_before(self, place: int, lengths: np.ndarray) -> int:
        """Return how many tokens precede a row of the chain."""
        epoch, within = divmod(place, len(lengths))
        order = self._order(_ROWS, epoch, len(lengths))
        return epoch * int(lengths.sum()) + int(lengths[order[:within]].sum())

    def _chunks(self, first: int) -> Iterator[dict[str, Tensor]]:
        if not self.prefetch:
            yield from map(self._read, count(first))  # without end
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = pool.submit(self._read, first)
            for chunk in count(first + 1):
                ready = ahead.result()
                ahead = pool.submit(self._read, chunk)
                yield ready

    @torch.no_grad()
    def _read(self, chunk: int) -> dict[str, Tensor]:
        """Return the queries of a chunk's tokens, shuffled."""
        rows = self.rows[self._rows_of(chunk)]
        real = rows != PAD
        n_tokens = int(real.sum())
        # Where each token goes: written there at once, the chunk is never copied.
        places = torch.from_numpy(self._order(_TOKENS, chunk, n_tokens)).to(self.device)
        names = [site.hook_name for site in self.sites]
        queries: dict[str, Tensor] = {}
        at = 0
        for tokens, mask in zip(
            rows.split(self.rows_per_forward), real.split(self.rows_per_forward), strict=True
        ):
            # Padding stands to the right of a causal model's row: whatever it reads as, no real
            # token sees it.
            read = read_activations(self.model, tokens, names, autocast=self.autocast)
            to = places[at : at + int(mask.sum())]
            for name, value in read.items():
                here = value[mask.to(value.device)].flatten(1).to(self.device)
                if name not in queries:
                    queries[name] = here.new_empty(n_tokens, here.shape[1])
                queries[name][to] = here
            at += len(to)
        return queries

    def _rows_of(self, chunk: int) -> Int[Tensor, " place"]:
        """Return the rows of a chunk, in the order of their epochs."""
        start, n_rows = chunk * self.rows_per_chunk, len(self.rows)
        end = start + self.rows_per_chunk
        orders = [
            self._order(_ROWS, epoch, n_rows)[max(0, start - epoch * n_rows) : end - epoch * n_rows]
            for epoch in range(start // n_rows, -(-end // n_rows))
        ]
        return torch.from_numpy(np.concatenate(orders))

    def _order(self, kind: int, index: int, n: int) -> np.ndarray:
        return np.random.default_rng([self.seed, kind, index]).permutation(n)


def chunk_bytes(n_rows: int, row_tokens: int, d_in: int, item: int) -> int:
    """Return the memory of the queries of some rows, d_in numbers of `item` bytes a token."""
    return n_rows * row_tokens * d_in * item
