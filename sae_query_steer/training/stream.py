"""Queries of several sites in shuffled batches, of which batch k is a function of the seed and k.

Every epoch has its own order of the rows. The rows of all epochs are cut into chunks, the tokens of
a chunk are shuffled, and batches are cut from the chunks. Each order is drawn by its own generator,
so a stream can begin at any batch and a checkpoint needs none of its state; SAELens's checkpoints
lose the mixing buffer and the state of the generator.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_query_steer.config import TrainingConfig
from sae_query_steer.data.batches import PAD
from sae_query_steer.models.activations import read_activations
from sae_query_steer.sites import QuerySite

Queries = dict[str, Float[Tensor, "token d_in"]]
"""Flat queries of the same tokens, by hook name."""

_ROWS, _TOKENS = 0, 1  # which order a generator draws


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryStream:
    """An endless stream of shuffled batches of queries; the texts are read as often as needed."""

    model: Any
    """A HookedTransformer or a TransformerBridge."""

    rows: Int[Tensor, "row pos"]
    """Token rows, `PAD` where there is no token."""

    sites: Sequence[QuerySite]
    """The sites, all served from one forward pass."""

    config: TrainingConfig
    """Sizes of batches, passes and chunks; a chunk of `n_batches_in_buffer` rows is shuffled."""

    @property
    def device(self) -> str:
        """Device on which chunks are kept."""
        device = self.config.act_store_device
        return str(self.model.cfg.device) if device == "with_model" else device

    def batches(self, start: int = 0) -> Generator[Queries]:
        """Yield batch `start` and all that follow, the same whatever `start` is.

        With `prefetch` the model is in use until the generator is closed.
        """
        size = self.config.train_batch_size_tokens
        first, skip = self._find(start * size)
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

    def take(self, n: int, description: str, *, start: int = 0) -> Iterator[Queries]:
        """Yield `n` batches from batch `start` on, with a progress bar."""
        with closing(self.batches(start)) as batches:
            yield from tqdm(islice(batches, n), description, n, unit="batch")

    def _find(self, token: int) -> tuple[int, int]:
        """Return the chunk that holds a token of the chain, and how many of its tokens precede."""
        lengths = (self.rows != PAD).sum(1).numpy()
        epoch, rest = divmod(token, int(lengths.sum()))
        ends = np.cumsum(lengths[self._order(_ROWS, epoch, len(lengths))])
        row = epoch * len(lengths) + int(np.searchsorted(ends, rest, side="right"))
        chunk = row // self.config.n_batches_in_buffer
        return chunk, token - self._tokens_before(chunk * self.config.n_batches_in_buffer, lengths)

    def _tokens_before(self, place: int, lengths: np.ndarray) -> int:
        """Return how many tokens precede a row of the chain."""
        epoch, within = divmod(place, len(lengths))
        order = self._order(_ROWS, epoch, len(lengths))
        return epoch * int(lengths.sum()) + int(lengths[order[:within]].sum())

    def _chunks(self, first: int) -> Iterator[dict[str, Tensor]]:
        if not self.config.prefetch:
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
            rows.split(self.config.store_batch_size_prompts),
            real.split(self.config.store_batch_size_prompts),
            strict=True,
        ):
            # Padding stands to the right of a causal model's row: whatever it reads as, no real
            # token sees it.
            read = read_activations(self.model, tokens, names, autocast=self.config.autocast_lm)
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
        start, n_rows = chunk * self.config.n_batches_in_buffer, len(self.rows)
        end = start + self.config.n_batches_in_buffer
        orders = [
            self._order(_ROWS, epoch, n_rows)[max(0, start - epoch * n_rows) : end - epoch * n_rows]
            for epoch in range(start // n_rows, -(-end // n_rows))
        ]
        return torch.from_numpy(np.concatenate(orders))

    def _order(self, kind: int, index: int, n: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, kind, index]).permutation(n)


def buffer_bytes(
    config: TrainingConfig, sites: Sequence[QuerySite], row_tokens: int, item: int
) -> int:
    """Return the memory of the queries that wait to be shuffled, `item` bytes a number."""
    d_in = sum(site.d_in for site in sites)
    return (2 if config.prefetch else 1) * config.n_batches_in_buffer * row_tokens * d_in * item
