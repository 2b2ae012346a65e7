"""Queries of several sites in shuffled batches, of which batch k is a function of the seed and k.

Every epoch has its own order of the rows. The rows of all epochs are cut into chunks, the tokens of
a chunk are shuffled, and batches are cut from the chunks. Each order is drawn by its own generator,
so a stream can begin at any batch and a checkpoint needs none of its state; SAELens's checkpoints
lose the mixing buffer and the state of the generator.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
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
        for places, chunk in self._chunks(first, skip + n * size):
            while skip < len(places):
                taken = places[skip : skip + missing]
                parts.append({name: found.index_select(0, taken) for name, found in chunk.items()})
                skip, missing = skip + len(taken), missing - len(taken)
                if missing == 0:
                    whole = {name: [part[name] for part in parts] for name in chunk}
                    parts, missing = [], size
                    yield {name: torch.cat(x) if len(x) > 1 else x[0] for name, x in whole.items()}
            skip = 0

    def take(self, n: int, description: str, *, start: int = 0) -> Iterator[Queries]:
        """Yield `n` batches from batch `start` on, with a progress bar."""
        batches = islice(self.batches(start, n), n)
        return iter(progress_bar(batches, description, n, unit="batch"))

    def _chunks(
        self, first: int, n_tokens: int | float
    ) -> Iterator[tuple[Int[Tensor, " token"], Queries]]:
        """Yield the shuffled places of a chunk's tokens, and their queries, from `first` on.

        All chunks of one size are in the same memory.
        """
        queries: Queries = {}

        def keep(batch: _ForwardBatch, name: str, found: Tensor) -> Tensor:
            if len(queries.get(name, ())) != batch.chunk_tokens:
                shape = (batch.chunk_tokens, found.shape[1])
                queries[name] = found.new_empty(shape, device=self.device)
            queries[name][batch.start : batch.end] = found
            return queries[name]

        for batch, received in self._forward(first, n_tokens, keep):
            for name, found in received.items():
                keep(batch, name, found)
            if batch.start < batch.end == batch.chunk_tokens:
                order = _order(self.config.seed, _TOKENS, batch.chunk, batch.chunk_tokens)
                yield torch.from_numpy(np.argsort(order)).to(self.device), queries

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
        self,
        first: int,
        n_tokens: int | float,
        keep: Callable[["_ForwardBatch", str, Tensor], Tensor],
    ) -> Iterator[tuple["_ForwardBatch", Queries]]:
        """Yield forward batches in their order, each with the queries that other ranks sent.

        `keep` gets the queries of a process that is alone, during the pass. The batches of a group,
        one for each rank, run at the same time. While a group is sent, the next one runs, if it is
        needed for `n_tokens`.
        """
        names = [site.hook_name for site in self.sites]
        batches = self._forward_batches(first)
        sent: list[Any] = []

        def read(batch: _ForwardBatch, kept: Int[Tensor, " token"], name: str, x: Tensor) -> Tensor:
            found = x.flatten(0, 1).flatten(1).index_select(0, kept.to(x.device))
            return keep(batch, name, found) if self.ranks.n == 1 else found

        while (group := list(islice(batches, self.ranks.n)))[0].begin < n_tokens:
            own = group[self.ranks.rank]
            kept = self._kept(own.tokens).flatten().nonzero()[:, 0]
            # Padding stands to the right of a causal model's row: whatever it reads as, no real
            # token sees it.
            found = read_activations(
                self.model,
                own.tokens,
                names,
                autocast=self.config.autocast_lm,
                keep=partial(read, own, kept),
            )
            if self.ranks.n == 1:
                yield own, {}
                continue
            for before, wait in sent:
                yield from zip(before, wait(), strict=True)
            sizes = [batch.end - batch.start for batch in group]
            sent = [(group, exchange(self.ranks, found, self.sites, sizes))]
        for before, wait in sent:
            yield from zip(before, wait(), strict=True)

    def _forward_batches(self, first: int) -> Iterator["_ForwardBatch"]:
        """Yield what one forward pass reads, from chunk `first` on."""
        begin = 0
        for chunk in count(first):
            rows = self.rows[self._rows_of(chunk)]
            n_tokens, start = int(self._kept(rows).sum()), 0
            for tokens in rows.split(self.config.store_batch_size_prompts):
                end = start + int(self._kept(tokens).sum())
                yield _ForwardBatch(begin, chunk, n_tokens, tokens, start, end)
                start = end
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
    chunk: int
    chunk_tokens: int
    tokens: Int[Tensor, "row pos"]
    start: int  # of its tokens in the chunk
    end: int


@lru_cache(maxsize=4)
def _order(seed: int, kind: int, index: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, kind, index]).permutation(n)
