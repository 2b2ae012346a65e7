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
from math import inf
from typing import Any, NamedTuple

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
from sae_query_steer.models.launch import ALONE, Ranks
from sae_query_steer.progress import progress_bar
from sae_query_steer.sites import QuerySite
from sae_query_steer.training.ranks import exchange

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
    """The sites, all read in one forward pass."""

    config: TrainingConfig
    """Sizes of batches, passes and chunks; a chunk of `n_batches_in_buffer` rows is shuffled."""

    ranks: Ranks = ALONE
    """The processes that share the forward pass. Each serves its own sites, and all must take the
    same batches at the same time."""

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

    @property
    def own(self) -> Sequence[QuerySite]:
        """The sites that this process serves."""
        return self.ranks.own(self.sites)

    def batches(self, start: int = 0, n: int | float = inf) -> Iterator[Queries]:
        """Yield batch `start` and all that follow, the same whatever `start` is; `n` or more."""
        size = self.config.train_batch_size_tokens
        first, skip = 0, start * size
        while skip >= (n_tokens := int(self._kept(self.rows[self._rows_of(first)]).sum())):
            first, skip = first + 1, skip - n_tokens
        parts, missing = [], size
        for end, chunk in self._chunks(first, skip + n * size):
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
        batches = islice(self.batches(start, n), n)
        return iter(progress_bar(batches, description, n, unit="batch"))

    def _chunks(self, first: int, n_tokens: int | float) -> Iterator[tuple[int, Queries]]:
        """Yield the size of a chunk and the queries of its tokens, shuffled, from `first` on."""
        queries: Queries = {}
        filled = 0
        for batch, found in self._forward(first, n_tokens):
            if not len(batch.places):  # it may follow the last token of its chunk
                continue
            # Where each token goes: written there at once, the chunk is never copied.
            places = torch.from_numpy(batch.places).to(self.device)
            for name, value in found.items():
                if name not in queries:
                    shape = (batch.chunk_tokens, value.shape[1])
                    queries[name] = value.new_empty(shape, device=self.device)
                queries[name][places] = value.to(self.device)
            filled += len(places)
            if filled == batch.chunk_tokens:
                yield filled, queries
                queries, filled = {}, 0

    @cached_property
    def _left_out(self) -> Int[Tensor, " id"]:
        given = self.config.exclude_special_tokens
        ids = get_special_token_ids(tokenizer_of(self.model)) if given is True else given or ()
        return torch.tensor([PAD, *ids], dtype=self.rows.dtype)

    def _kept(self, rows: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        """Return which places hold a token to train on."""
        return ~torch.isin(rows, self._left_out)

    @torch.no_grad()
    def _forward(
        self, first: int, n_tokens: int | float
    ) -> Iterator[tuple["_ForwardBatch", dict[str, Tensor]]]:
        """Yield forward batches in their order, each with the queries of this process's sites.

        The batches of a group, one for each rank, run at the same time. While a group is sent, the
        next one runs, if it is needed for `n_tokens`.
        """
        names = [site.hook_name for site in self.sites]
        batches = self._forward_batches(first)
        sent: list[Any] = []
        while (group := list(islice(batches, self.ranks.n)))[0].begin < n_tokens:
            own = group[self.ranks.rank].tokens
            # Padding stands to the right of a causal model's row: whatever it reads as, no real
            # token sees it.
            read = read_activations(self.model, own, names, autocast=self.config.autocast_lm)
            real = self._kept(own)
            found = {name: x[real.to(x.device)].flatten(1) for name, x in read.items()}
            if self.ranks.n == 1:
                yield group[0], found
                continue
            for before, wait in sent:
                yield from zip(before, wait(), strict=True)
            sizes = [len(batch.places) for batch in group]
            sent = [(group, exchange(self.ranks, found, self.sites, sizes))]
        for before, wait in sent:
            yield from zip(before, wait(), strict=True)

    def _forward_batches(self, first: int) -> Iterator["_ForwardBatch"]:
        """Yield what one forward pass reads, from chunk `first` on."""
        begin = 0
        for chunk in count(first):
            rows = self.rows[self._rows_of(chunk)]
            n_tokens = int(self._kept(rows).sum())
            order, at = _order(self.config.seed, _TOKENS, chunk, n_tokens), 0
            for tokens in rows.split(self.config.store_batch_size_prompts):
                end = at + int(self._kept(tokens).sum())
                yield _ForwardBatch(begin, n_tokens, tokens, order[at:end])
                at = end
            begin += n_tokens

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


class _ForwardBatch(NamedTuple):
    begin: int  # tokens of the stream before its chunk
    chunk_tokens: int
    tokens: Int[Tensor, "row pos"]
    places: np.ndarray  # of its tokens in the chunk


@lru_cache(maxsize=4)
def _order(seed: int, kind: int, index: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, kind, index]).permutation(n)
