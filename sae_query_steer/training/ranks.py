"""The processes of a launch, and how queries go from the one that read them to the one that trains.

Rank r of n trains the sites r, r + n, ... and runs the model over the forward batches r, r + n, ...
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, distributed

from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sites import QuerySite


@dataclass(frozen=True)
class Ranks:
    """This process and the others of its launch; by default there is no other."""

    rank: int = 0
    """Number of this process, from 0."""

    n: int = 1
    """Number of processes."""

    device: str = "cpu"
    """Where tensors are sent from: a GPU with NCCL, the CPU with gloo."""

    def own(self, sites: Sequence[QuerySite], rank: int | None = None) -> Sequence[QuerySite]:
        """Return the sites that a rank trains, this one by default; none if there are too few."""
        return sites[self.rank if rank is None else rank :: self.n]

    def wait(self) -> None:
        """Wait until all ranks are here.

        Raises:
            RuntimeError: see `exchange`.
        """
        if self.n > 1:
            with self.others():
                distributed.barrier()

    def exchange(
        self, queries: Mapping[str, Tensor], sites: Sequence[QuerySite], n_tokens: Sequence[int]
    ) -> Callable[[], list[dict[str, Tensor]]]:
        """Begin to send the queries of a forward batch to the ranks that train the sites.

        Args:
            queries: those of this rank's batch [token d_in], by hook name.
            sites: all of them.
            n_tokens: tokens of the batch of each rank.

        Returns:
            A function that waits for the end of it. It returns the queries of this rank's sites in
            the batch of each rank, in the order of ranks.

        Raises:
            RuntimeError: another rank has ended, or can't be reached.
        """
        everyone = range(self.n)
        ordered = [site.hook_name for rank in everyone for site in self.own(sites, rank)]
        sent = torch.cat([queries[name].to(self.device).flatten() for name in ordered])
        widths = [sum(site.d_in for site in self.own(sites, rank)) for rank in everyone]
        sizes = [n * widths[self.rank] for n in n_tokens]
        received = sent.new_empty(sum(sizes))
        shares = [n_tokens[self.rank] * width for width in widths]
        with self.others():
            work = distributed.all_to_all_single(received, sent, sizes, shares, async_op=True)
        assert work is not None, "async_op returns a handle"

        def wait() -> list[dict[str, Tensor]]:
            with self.others():
                work.wait()
            found = []
            for n, batch in zip(n_tokens, received.split(sizes), strict=True):
                parts = batch.split([n * site.d_in for site in self.own(sites)])
                pairs = zip(self.own(sites), parts, strict=True)
                found.append({site.hook_name: part.view(n, -1) for site, part in pairs})
            return found

        return wait

    def joined(
        self, share: QuerySAEs | None, sites: Sequence[QuerySite], folder: Path
    ) -> QuerySAEs:
        """Return the SAEs of all ranks, through files in a folder that all can read.

        Args:
            share: those of this rank, None if it has no site.
            sites: the sites of all.
            folder: on a disk that all share.

        Raises:
            RuntimeError: see `exchange`.
        """
        if share is not None:
            if self.n == 1:
                return share
            share.save(folder / f"rank-{self.rank}", overwrite=True)
        self.wait()
        parts = [
            QuerySAEs.load(folder / f"rank-{rank}", device=self.device)
            for rank in range(min(self.n, len(sites)))
        ]
        self.wait()
        return join_ranks(parts, sites)

    @contextmanager
    def others(self) -> Iterator[None]:
        """Name the cause where a call that needs the other ranks fails.

        Raises:
            RuntimeError: another rank has ended, or can't be reached.
        """
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.n} stops because another rank has ended or can't be "
                "reached: its own error says why; start all again, with resume=True to continue "
                "from the last checkpoint"
            ) from error


ALONE = Ranks()
"""One process."""


def join_ranks(parts: Sequence[QuerySAEs], sites: Sequence[QuerySite]) -> QuerySAEs:
    """Return the SAEs of several processes as one process would have returned them."""
    names = [site.hook_name for site in sites]
    saes = {name: part[name] for name in names for part in parts if name in part}
    metrics = None
    if all(part.measured for part in parts):
        table = pd.concat([part.metrics for part in parts])
        layers = [table[table["layer"] == site.layer] for site in sites]
        metrics = pd.concat(layers, ignore_index=True)
    return QuerySAEs(saes, metrics, parts[0].settings)
