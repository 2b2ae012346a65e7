"""Queries of several sites in shuffled batches, of which batch k is a function of the seed and k.

Every epoch has its own order of the rows. The rows of all epochs are cut into chunks, the tokens of
a chunk are shuffled, and batches are cut from the chunks. Each order is drawn by its own generator,
so a stream can begin at any batch and a checkpoint needs none of its state; SAELens's checkpoints
lose the mixing buffer and the state of the generator.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_query_steer.arguments import check_device
from sae_query_steer.config import TrainingConfig
from sae_query_steer.data.batches import PAD
from sae_query_steer.data.prompts import tokenizer_of
from sae_query_steer.models.activations import read_activations
from sae_query_steer.progress import progress_bar
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

    def __post_init__(self) -> None:
        check_device(self.device)
        if not any(bool(self._kept(rows).any()) for rows in self.rows.split(2**16)):
            raise ValueError(
                "exclude_special_tokens must leave tokens to train on, got "
                f"{self.config.exclude_special_tokens} of texts that have no others"
            )

    @property
    def device(self) -> str:
        """Device on which chunks are kept."""
        device = self.config.act_store_device
        return str(self.model.cfg.device) if device == "with_model" else device

    def batches(self, start: int = 0) -> Iterator[Queries]:
        """Yield batch `start` and all that follow, the same whatever `start` is."""
        size = self.config.train_batch_size_tokens
        first, skip = 0, start * size
        while skip >= (n_tokens := int(self._kept(self.rows[self._rows_of(first)]).sum())):
            first, skip = first + 1, skip - n_tokens
        parts, missing = [], size
        for chunk in map(self._read, count(first)):
            end = len(next(iter(chunk.values())))
            while skip < end:
                stop = min(skip + missing, end)
                parts.append({name: queries[skip:stop] for name, queries in chunk.items()})
                skip, missing = stop, missing - (stop - skip)
                if missing == 0:
                    yield {name: torch.cat([part[name] for part in parts]) for name in chunk}
                    parts, missing = [], size
            # Copies, so that no view keeps the whole chunk in memory.
            parts = [{name: value.clone() for name, value in part.items()} for part in parts]
            skip = 0
            del chunk  # before the next one is read

    def take(self, n: int, description: str, *, start: int = 0) -> Iterator[Queries]:
        """Yield `n` batches from batch `start` on, with a progress bar."""
        return iter(progress_bar(islice(self.batches(start), n), description, n, unit="batch"))

    @cached_property
    def _left_out(self) -> Int[Tensor, " id"]:
        given = self.config.exclude_special_tokens
        ids = get_special_token_ids(tokenizer_of(self.model)) if given is True else given or ()
        return torch.tensor([PAD, *ids], dtype=self.rows.dtype)

    def _kept(self, rows: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        """Return which places hold a token to train on."""
        return ~torch.isin(rows, self._left_out)

    @torch.no_grad()
    def _read(self, chunk: int) -> Queries:
        """Return the queries of a chunk's tokens, shuffled."""
        rows = self.rows[self._rows_of(chunk)]
        n_tokens = int(self._kept(rows).sum())
        # Where each token goes: written there at once, the chunk is never copied.
        order = _order(self.config.seed, _TOKENS, chunk, n_tokens)
        places = torch.from_numpy(order).to(self.device)
        names = [site.hook_name for site in self.sites]
        queries: dict[str, Tensor] = {}
        at = 0
        for tokens in rows.split(self.config.store_batch_size_prompts):
            # Padding stands to the right of a causal model's row: whatever it reads as, no real
            # token sees it.
            read = read_activations(self.model, tokens, names, autocast=self.config.autocast_lm)
            real = self._kept(tokens)
            to = places[at : at + int(real.sum())]
            for name, value in read.items():
                here = value[real.to(value.device)].flatten(1).to(self.device)
                if name not in queries:
                    queries[name] = here.new_empty(n_tokens, here.shape[1])
                queries[name][to] = here
            at += len(to)
        return queries

    def _rows_of(self, chunk: int) -> Int[Tensor, " place"]:
        """Return the rows of a chunk, in the order of their epochs."""
        size, seed = self.config.n_batches_in_buffer, self.config.seed
        places = np.arange(chunk * size, (chunk + 1) * size)
        epochs, places = np.divmod(places, len(self.rows))
        orders = [
            _order(seed, _ROWS, int(epoch), len(self.rows))[places[epochs == epoch]]
            for epoch in np.unique(epochs)
        ]
        return torch.from_numpy(np.concatenate(orders))


@lru_cache(maxsize=4)
def _order(seed: int, kind: int, index: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, kind, index]).permutation(n)
